"""Small data files in the forms that tasks officially have them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from tasks import glue
from tasks.commonsense import SPECS

HEADERS = {
    "cola": None,
    "sst2": "sentence\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "mnli": "index\tpromptID\tpairID\tgenre\tparse1\tparse2\tparse3\tparse4\tsentence1\tsentence2\tlabel1\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
}

# One row that breaks careless readers (lone quote, words that mean "missing" to pandas), and one of another label.
TEXTS = [('a "lone quote', "N/A"), ("null", "none ' of it")]


def official_line(subset: str, number: int) -> str:
    first, second = TEXTS[number]
    spec = glue.SPECS[subset]
    label = spec.labels[number] if spec.named else ("2.5", "5.000")[number] if subset == "stsb" else str(number)
    return {
        "cola": f"gj04\t{label}\t*\t{first}",
        "sst2": f"{first}\t{label}",
        "mrpc": f"{label}\t7\t8\t{first}\t{second}",
        "stsb": f"{number}\tg\tf\ty\to\ts\ts\t{first}\t{second}\t{label}",
        "qqp": f"{number}\t1\t2\t{first}\t{second}\t{label}",
        "mnli": f"{number}\tp\tp\tg\tx\tx\tx\tx\t{first}\t{second}\t{label}\t{label}",
        "qnli": f"{number}\t{first}\t{second}\t{label}",
        "rte": f"{number}\t{first}\t{second}\t{label}",
    }[subset]


def write_official(root, subset: str, packed: bool = False) -> None:
    folder = root / "glue" / glue.SPECS[subset].folder
    folder.mkdir(parents=True)
    lines = [HEADERS[subset]] if HEADERS[subset] else []
    lines += [official_line(subset, i) for i in range(2)]
    if subset == "qqp":
        lines.append("9\t9\t9\tonly one question")
    for split in ("train", "dev", "dev_matched", "dev_mismatched"):
        data = ("\n".join(lines) + "\n").encode()
        name = f"{split}.tsv" + (".gz" if packed else "")
        (folder / name).write_bytes(gzip.compress(data) if packed else data)


ITEMS = {
    "boolq": (
        "Please answer the following question with true or false, question: is a fig a fruit?\n\n"
        "Answer format: true/false",
        "true",
    ),
    "piqa": (
        "Please choose the correct solution to the question: dry a {plate}\n\nSolution1: use a towel \n\n"
        "Solution2: use a spoon\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Ann met Bea. Who met?\n\n"
        "Answer1: Ann Answer2: Bob Answer3: Cy\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Sewing: Ann sews. she\n\n"
        "Ending1: sings. Ending2: sleeps. Ending3: cuts the thread. Ending4: [title] flies.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending3",
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ann met Bea, _ waved."
        "\n\nOption1: Ann Option2: Bea Answer format: option1/option2",
        "option2",
    ),
    "ARC-Easy": (
        "Please choose the correct answer to the question: What is wet?\n\n"
        "Answer1: sand Answer2: ice Answer3: glass Answer4: wood Answer5: rain\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
    ),
    "ARC-Challenge": (
        "Please choose the correct answer to the question: What is dry?\n\n"
        "Answer1: rain Answer2: sand Answer3: a river\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: There is fog around\n\n"
        "Answer1: a marsh Answer2: a tundra Answer3: the plains Answer4: a desert\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
}


def official(name: str) -> dict[str, str]:
    instruction, answer = ITEMS[name]
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Return what makes a file of this content."""

    def make(here: Path) -> None:
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def e2e_files(here: Path) -> None:
    for name in ("train", "valid", "test"):
        write(f"e2e/{name}.txt", "name : Oak | food : soup||Oak serves soup .\n")(here)


def challenge_files(here: Path) -> None:
    for name in ("trainset", "devset", "testset_w_refs"):
        write(f"e2e-dataset/{name}.csv", 'mr,ref\n"name[Oak], food[soup]",Oak serves soup.\n')(here)


def commonsense_files(here: Path) -> None:
    for name in SPECS:
        write(f"dataset/{name}/test.json", json.dumps([official(name)]))(here)
    write("ft-training_set/commonsense_170k.json", json.dumps([official(name) for name in SPECS]))(here)


def webnlg_files(here: Path) -> None:
    fact = {"subject": "Oak", "property": "serves", "object": "soup"}
    text = {"comment": "good", "lex": "Oak serves soup."}
    entry = {"category": "Food", "modifiedtripleset": [fact], "lexicalisations": [text]}
    for name in ("train", "dev", "test"):
        content = json.dumps({"entries": [{"1": entry}, {"2": entry}]})
        write(f"webnlg_challenge_2017/{name}.json", content)(here)


def dart_files(here: Path) -> None:
    entry = {"tripleset": [["Oak", "SERVES", "soup"]], "annotations": [{"text": "Oak serves soup."}]}
    for name in ("train", "dev", "test"):
        write(f"dart/dart-v1.1.1-full-{name}.json", json.dumps([entry]))(here)
