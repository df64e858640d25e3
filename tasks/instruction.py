"""Instructions and their responses from files of your own (which files: tasks/own_files.py).

A row has one of three forms, which its columns tell:

    prompt, response              learnt as they are, `separator` between them; the options name other columns
    instruction, input, output    Alpaca's (github.com/tatsu-lab/stanford_alpaca), in its prompt; `input` may be empty
    messages                      [{"role": "user", "content": "..."}, ...]; the last one, an assistant's, is the
                                  response, all before it the prompt

Loss is only on the response. With model.chat=true the prompt goes through the tokenizer's chat template, as messages;
else messages are written as text, each below a line with its role, and the model writes text.

Scores: exact match (but for white space at the ends), ROUGE-L and chrF, means over rows, of the text that is generated;
none depends on the Unicode form of accents. And `loss`, the mean negative log-likelihood of a response's tokens, in
nats, without the token that ends it.
"""

import unicodedata
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

from tasks import base
from tasks.base import Output, Row, TaskError
from tasks.own_files import OwnFiles, Place, Placed, get_text, read_rows

if TYPE_CHECKING:
    from tasks.measures import Score

VERSION = 2  # 1: combining marks were no part of ROUGE-L's words, and accents were compared by their Unicode form
METRICS = ("rouge_l", "chrf", "exact_match")
ALPACA = ("instruction", "output")
BELOW = "Below is an instruction that describes a task"
# Columns of which others make a part of the prompt; without it the response answers something unseen.
CONTEXT = ("input", "context", "system", "history", "tools", "passage", "passages", "document", "documents")
EMPTY = ("", "[]", "{}", "null", "None", "nan")
RESPOND = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
PREAMBLES = {
    True: f"{BELOW}, paired with an input that provides further context. {RESPOND}",
    False: f"{BELOW}. {RESPOND}",
}
MESSAGE_KEYS, NOTHING = ("role", "content"), (None, "", [], {})
ROLES = {"system": "### System:", "user": "### User:", "assistant": "### Assistant:"}


def task(
    subset: str,
    prompt: str = "prompt",
    response: str = "response",
    separator: str = "\n",
    metric: str = "rouge_l",
    loss: bool = True,
    scored: str = "test",
    held_out: float = 0.1,
    split_seed: int = 0,
    quotes: bool = True,
    overlap: bool = False,
) -> "Instruction":
    """Return the task; `prompt` and `response` name columns, and own_files.py explains the last five options.

    Raises:
        TaskError: an option is wrong.
    """
    if subset:
        raise TaskError(f"instruction/{subset}: no such task, only instruction")
    if metric not in METRICS:
        raise TaskError(f"task.options.metric={metric}: must be one of {', '.join(METRICS)}")
    if not prompt or not response or prompt == response:
        raise TaskError("task.options: prompt and response must be the names of different columns")
    files = {"scored": scored, "held_out": held_out, "split_seed": split_seed, "quotes": quotes, "overlap": overlap}
    return Instruction((prompt, response), separator, metric, loss, files)


class Instruction(OwnFiles):
    """Prompts with one accepted response each."""

    name, version, form, unscaled, lower_is_better = "instruction", VERSION, "generation", ("loss",), ("loss",)
    row_types: ClassVar[dict[str, Any]] = base.COLUMNS["generation"] | {
        "messages": [{"role": "string", "content": "string"}]
    }

    def __init__(self, columns: tuple[str, str], separator: str, metric: str, loss: bool, files: dict) -> None:
        super().__init__(**files)
        self.columns, self.separator, self.metric, self.loss = columns, separator, metric, loss

    def list_needed_columns(self, known: Row) -> tuple[str, ...]:
        """Return the columns of the form that the file's first row has, or has the larger part of."""
        forms = (self.columns, ALPACA, ("messages",))
        return max(forms, key=lambda form: sum(name in known for name in form) / len(form))

    def explain_unused_option(self, name: str) -> str | None:
        if name not in ("prompt", "response", "separator"):
            return super().explain_unused_option(name)
        path = self.find_used_files(None)["train"][0]
        _, row = read_rows(path, self.quotes)[0]
        if set(self.columns) <= row.keys():
            return None
        has = ", ".join(self.list_needed_columns(row))
        return f"only rows of a prompt and a response use it, and {path.name} has {has}; drop it"

    def describe_remedy(self) -> str:
        remedy = "name yours with task.options.prompt and response"
        return f"{remedy}, or give instruction and output, or messages"

    def get_example_key(self, row: Row) -> Hashable:
        return tuple((message["role"], message["content"]) for message in row["messages"])

    def parse(self, placed: Placed) -> Row:
        place, row = placed
        if set(self.columns) <= row.keys():
            prompt, target = (get_text(place, row, name) for name in self.columns)
            used, messages, prompt = self.columns, [build_user_message(prompt)], prompt + self.separator
        elif set(ALPACA) <= row.keys():
            used = (*ALPACA, "input")
            instruction, target = (get_text(place, row, name) for name in ALPACA)
            given = get_input(place, row)
            messages = [build_user_message(f"{instruction}\n\n{given}" if given else instruction)]
            context = f"\n\n### Input:\n{given}" if given else ""
            prompt = f"{PREAMBLES[bool(given)]}{instruction}{context}\n\n### Response:\n"
        else:
            used = ("messages",)
            *messages, answer = parse_messages(place, row["messages"])
            target = answer["content"]
            turns = [*(f"{ROLES[m['role']]}\n{m['content']}" for m in messages), f"{ROLES['assistant']}\n"]
            prompt = "\n\n".join(turns)
        texts = {text.strip() for text in (prompt, target, *(message["content"] for message in messages))}
        check_other_columns(place, row, used, (*self.columns, *ALPACA, "messages"), texts)
        return {"prompt": prompt, "target": target, "references": [target], "messages": messages}

    def choices(self, row: Row) -> list[str]:
        """Return the response, whose likelihood is the loss."""
        return [row["target"]] if self.loss else []

    def judge_choice(self, row: Row, likelihoods: list[float], tokens: list[int]) -> Row:
        return {"log_likelihood": likelihoods[0], "tokens": tokens[0]}

    def judge(self, row: Row, output: Output) -> Row:
        from tasks import metrics

        answer, gold = (unicodedata.normalize("NFC", text.strip()) for text in (output, row["target"]))
        return {
            "prompt_sha256": base.text_sha256(row["prompt"]),
            "answer": answer,
            "gold": gold,
            "exact_match": float(answer == gold),
            "rouge_l": metrics.rouge_l(answer, [gold]),
            "chrf": metrics.sentence_chrf(answer, [gold]),
        }

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        """Return exact match, ROUGE-L and chrF, and the loss where likelihoods were asked for."""
        (rows,) = results.values()
        scores = {name: sum(row[name] for row in rows) / len(rows) for name in METRICS}
        if "log_likelihood" in rows[0]:
            scores["loss"] = -sum(row["log_likelihood"] for row in rows) / sum(row["tokens"] for row in rows)
        return scores

    def declare_scores(self, example: Row) -> "dict[str, Score]":
        from tasks import measures

        found = {name: measures.Score(measures.select_column(name), measures.mean) for name in METRICS}
        if "log_likelihood" in example:
            found["loss"] = measures.Score(lambda row: (-row["log_likelihood"], row["tokens"]), measures.quotient)
        return found


def get_input(place: Place, row: Row) -> str:
    """Return the input of an Alpaca row without the blanks around it; "" if it is empty, null or no column.

    Raises:
        TaskError: it is not text, or its column is spelt in another way.
    """
    if "input" not in row and (near := base.find_similar_column("input", row)):
        raise TaskError(f"{place}: no column 'input', but {base.quote(near)}; name it input, or remove it")
    if row.get("input") is None:
        return ""
    return get_text(place, row, "input", empty=True).strip()


def check_other_columns(place: Place, row: Row, used: tuple[str, ...], forms: tuple[str, ...], texts: set[str]) -> None:
    """Refuse columns that belong to the prompt, or to another form, but are not `used`.

    forms: the columns of all forms. texts: what is made of those used; a column that repeats one is no loss.

    Raises:
        TaskError: with the columns.
    """
    values = {name: str(value or "").strip() for name, value in row.items() if name not in used}
    filled = {name: value for name, value in values.items() if value not in EMPTY}
    for name in filled:
        if name.strip().casefold() in CONTEXT:
            what = f"{place}, column {base.quote(name)}: is not part of a prompt made of {used[0]}"
            raise TaskError(f"{what}; merge it into {used[0]!r}, or remove or rename the column")
    known = {name.casefold() for name in forms}
    others = [
        base.quote(name) for name, value in filled.items() if name.strip().casefold() in known and value not in texts
    ]
    if others:
        what = f"{place}: {' and '.join(others)} of another form than {used[0]!r} would be left out"
        raise TaskError(f"{what}; keep one form, and remove or rename the columns of the other")


def build_user_message(text: str) -> Row:
    """Return a text as the message of a user."""
    return {"role": "user", "content": text}


def parse_messages(place: Place, value: Any) -> list[Row]:
    """Return the messages of a row.

    Raises:
        TaskError: they are not messages, one has an unknown role or no content, or the last is not an answer.
    """
    column = f"{place}, column 'messages'"
    like = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if isinstance(value, str) and value.strip():
        raise TaskError(f"{column}: is text, not a list of messages; save the table as .jsonl and {like}")
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(message, dict) for message in value):
        raise TaskError(f"{column}: not a list of two or more messages; {like}")
    found = []
    for number, message in enumerate(value, start=1):
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            what = f"message {number} has the role {base.quote(role)}, not one of {', '.join(ROLES)}"
            raise TaskError(f"{column}: {what}; {like}")
        content = message.get("content")
        if content is None or isinstance(content, str) and not content.strip():
            raise TaskError(f"{column}: message {number} has no content; fill it in or remove the row")
        if not isinstance(content, str):
            what = f"the content of message {number} is {base.quote(content)}, not text"
            raise TaskError(f"{column}: {what}; {like}")
        if other := [key for key, part in message.items() if key not in MESSAGE_KEYS and part not in NOTHING]:
            what = f"message {number} has {base.quote(other[0])}, of which nothing is trained on"
            raise TaskError(f"{column}: {what}; remove it, or put what matters of it into the content")
        found.append({"role": role, "content": get_text(place, {"messages": content}, "messages")})
    if found[-1]["role"] != "assistant":
        raise TaskError(f"{column}: ends with the {found[-1]['role']}; the last message must be the assistant's answer")
    return found
