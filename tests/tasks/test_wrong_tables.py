"""Tables of one's own that are wrong in ways a spreadsheet, pandas, a download or a hurried hand makes them: each is
answered in one line that names file, line, column and remedy."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

import tasks
from tasks.base import quote
from tasks.own_files import find_files

C, N = "classification", "instruction"
NUMBERS = {"metric": "pearson"}
GOOD = {"train.csv": "text,label\na,x\nb,y\n", "test.csv": "text,label\nc,x\nd,y\n"}
ZEROS = {"train.csv": "text,label\na,0\nb,1\n", "test.csv": "text,label\nc,0\nd,1\n"}


def parquet(**columns: list) -> bytes:
    """Return columns as the content of a Parquet file."""
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def unreadable(values: pyarrow.Array) -> bytes:
    """Return a table with a column that no task uses."""
    return parquet(text=["a"], label=["x"], other=values)


def line(**row: object) -> str:
    return json.dumps(row) + "\n"


def chat(*turns: tuple[str, object]) -> str:
    return line(messages=[{"role": role, "content": content} for role, content in turns])


def rows_of(tmp_path, files: dict[str, str | bytes], name: str = C, options: dict | None = None) -> tuple:
    """Return the task on these files with its training rows and those that are scored."""
    for file, content in files.items():
        (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    task = tasks.load(name, options or {}, str(tmp_path))
    task.source(str(tmp_path))
    return task, task.split("train").rows, task.split(task.eval_splits[0]).rows


ONE_JSON = '{"text": "a", "label": "x"}\n'
TRAIN_JSONL = {"test.csv": GOOD["test.csv"]}
# fmt: off
WRONG = {
    # the name says one thing, the content another
    "gzipped, but not called so": (C, {}, GOOD | {"train.csv": gzip.compress(b"text,label\n")}, "train.csv: its content is gzipped; add .gz to its name"),
    "called gzipped, but not": (C, {}, {"train.csv.gz": GOOD["train.csv"]}, "train.csv.gz: its content is not gzipped; take .gz off its name"),
    "a spreadsheet called CSV": (C, {}, GOOD | {"train.csv": b"PK\x03\x04\x14\0"}, "train.csv: its content is a zip archive or a spreadsheet; unpack it, or export it as CSV"),
    "a spreadsheet": (C, {}, {"train.xlsx": b"PK\x03\x04"}, "or .parquet in it, only train.xlsx; save your table as one of these"),
    "Parquet called CSV": (C, {}, GOOD | {"train.csv": parquet(text=["a"], label=["x"])}, "train.csv: its content is Parquet; name it .parquet"),
    "CSV called Parquet": (C, {}, {"train.parquet": GOOD["train.csv"]}, "train.parquet: its content is not Parquet; name it by what it is"),
    "Parquet cut short": (C, {}, {"train.parquet": parquet(text=["a"], label=["x"])[:-9]}, "train.parquet: cannot be read as Parquet"),
    "an object a line, called CSV": (C, {}, GOOD | {"train.csv": ONE_JSON}, "train.csv: its content is JSON; name it .jsonl"),
    "a list, called CSV": (C, {}, GOOD | {"train.csv": f"[{ONE_JSON}]"}, "train.csv: its content is JSON; name it .json"),
    "a list, called JSONL": (C, {}, TRAIN_JSONL | {"train.jsonl": f"[\n{ONE_JSON}]\n"}, "train.jsonl: its content is one list, not an object a line; name it .json"),
    "an object a line, called JSON": (C, {}, TRAIN_JSONL | {"train.json": ONE_JSON * 2}, "train.json: not JSON (Extra data at line 2, character 1); give a list of objects, or a .jsonl"),
    "UTF-16 without a mark": (C, {}, GOOD | {"train.csv": "text,label\n".encode("utf-16-le")}, "line 1 holds a zero byte"),
    "gzip cut short": (C, {}, {"train.csv.gz": gzip.compress(b"text,label\na,x\n" * 99)[:-12]}, "train.csv.gz: cannot be read (Compressed file ended"),
    # JSON by hand
    "a comma after an object": (C, {}, TRAIN_JSONL | {"train.jsonl": '{"text": "a", "label": "x"},\n'}, "line 1: not JSON (Extra data at character 28); write one object a line; end the line without a comma"),
    "an object over several lines": (C, {}, TRAIN_JSONL | {"train.jsonl": json.dumps({"text": "a"}, indent=1)}, "train.jsonl: line 1: not JSON (Expecting property name enclosed in double quotes at character 2); write one object a line"),
    "a line cut short": (C, {}, TRAIN_JSONL | {"train.jsonl": f'{ONE_JSON}{{"text": "b'}, "train.jsonl: line 2: not JSON (Unterminated string starting at character 10)"),
    "an object for a text": (C, {}, TRAIN_JSONL | {"train.jsonl": line(text={"en": "a"}, label="x")}, "line 1, column 'text': {'en': 'a'} is not text; write one text, or name another column"),
    "several classes": (C, {}, TRAIN_JSONL | {"train.jsonl": line(text="a", label=["x", "y"])}, "line 1, column 'label': ['x', 'y'] is not text; write one text"),
    "types that differ": (C, {}, TRAIN_JSONL | {"train.jsonl": ONE_JSON + line(text=5, label="y")}, "line 2, column 'text': 5 is not text; write it in quotation marks"),
    # columns
    "two columns that are missing": (C, {}, GOOD | {"train.csv": "review,stars\na,x\n"}, "train.csv: no columns 'text' and 'label', only review, stars; name yours with"),
    "a column by its number": (C, {"label": "1"}, GOOD, "train.csv: no column '1', only text, label"),
    "a blank after a column": (C, {}, GOOD | {"train.csv": "text ,label\na,x\n"}, "train.csv: no column 'text', but 'text '"),
    "a line break in a column's name": (C, {}, GOOD | {"train.csv": '"te\nxt",label\na,x\n'}, "train.csv: no column 'text', only 'te\\nxt', label"),
    "a Parquet file of other columns": (C, {}, {"train.parquet": parquet(sentence=["a"], label=["x"])}, "train.parquet: no column 'text', only sentence, label"),
    "a test file without labels": (C, {}, GOOD | {"test.csv": "text\nc\n"}, "test.csv: no column 'label', only text; name yours with task.options.text, text_pair and label; task.options.scored=validation leaves the test file out"),
    "a column that no line ends": (C, {"label": "q" * 5000}, GOOD, f"no column '{'q' * 60}'..., only text, label"),
    # classes
    "a test file whose labels are hidden": (C, {}, ZEROS | {"test.csv": "text,label\nc,-1\nd,-1\n"}, "test.csv: line 2, column 'label': the class '-1' is in test but not in train; add rows of it there, fix the row, or list the classes with task.options.labels; task.options.scored=validation leaves"),
    "1.0 beside 1": (C, {}, ZEROS | {"train.csv": "text,label\na,1\nb,0\ne,1.0\n"}, "train.csv: line 4, column 'label': '1.0' and '1' differ in spelling only; write both alike, or list"),
    "1.0 in one file and 1 in the other": (C, {}, ZEROS | {"test.csv": "text,label\nc,0.0\nd,1.0\n"}, "'label': '0.0' and '0' differ in spelling only"),
    "a character nobody sees": (C, {}, GOOD | {"train.csv": "text,label\na,x\nb,y\ne,x\u200b\n"}, r"train.csv: line 4, column 'label': 'x\u200b' and 'x' differ in spelling only"),
    "an accent in two forms": (C, {}, {"data.csv": "text,label\na,caf\u00e9\nb,cafe\u0301\nc,x\nd,x\n"}, r"'caf\xe9' and 'cafe\u0301' differ in spelling only"),
    "a class that stands for a gap": (C, {}, GOOD | {"train.csv": "text,label\na,x\nb,y\ne,N/A\n"}, "train.csv: line 4, column 'label': 'N/A' stands for a missing value; fill it in, remove the row, or list all classes"),
    "NaN in Parquet": (C, {}, {"train.parquet": parquet(text=["a", "b"], label=[1.0, float("nan")]), "test.csv": ZEROS["test.csv"]}, "train.parquet: row 2, column 'label': empty"),
    "a column of maps": (C, {}, {"train.parquet": unreadable(pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())))}, "train.parquet: column 'other' cannot be read ("),
    "a date beyond all": (C, {}, {"train.parquet": unreadable(pyarrow.array([10**7], pyarrow.date32()))}, "date value out of range); remove the column, or save it as text"),
    "text that is not UTF-8": (C, {}, {"train.parquet": unreadable(pyarrow.StringArray.from_buffers(1, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xe9")))}, "column 'other' cannot be read ('utf-8' codec can't decode"),
    "a time zone that is not known": (C, {}, {"train.parquet": unreadable(pyarrow.array([0], pyarrow.timestamp("ms", "Nowhere/Land")))}, "train.parquet: column 'other' cannot be read ("),
    "a class called sNaN": (C, {}, GOOD | {"train.csv": "text,label\na,x\nb,y\ne,sNaN\n"}, "line 4, column 'label': 'sNaN' stands for a missing value"),
    "a class as long as a book": (C, {}, {"train.csv": f"text,label\na,{'y' * 100_000}\nb,x\n", "test.csv": "text,label\nc,x\n"}, f"train.csv: line 2, column 'label': the class '{'y' * 60}'... is in train but not in test"),
    # numbers
    "one number for all": (C, NUMBERS, {"train.csv": "text,label\na,1\nb,1\n", "test.csv": "text,label\nc,1\nd,2\n"}, "train.csv: column 'label': the 2 rows from line 2 have one number only, 1; add rows of others"),
    "a number beyond all": (C, NUMBERS, TRAIN_JSONL | {"train.jsonl": '{"text": "a", "label": %s}\n' % ("9" * 400)}, "line 1, column 'label': '999"),
    "a percentage": (C, NUMBERS, GOOD | {"train.csv": "text,label\na,50%\n"}, "line 2, column 'label': '50%' is not a finite number"),
    # prompts and messages
    "Alpaca's without output": (N, {}, {"train.json": json.dumps([{"instruction": "a", "input": ""}])}, "train.json: row 1: no column 'output', only instruction, input"),
    "ShareGPT's": (N, {}, {"train.jsonl": line(conversations=[])}, "train.jsonl: line 1: no columns 'prompt' and 'response', only conversations; name yours"),
    "two forms in a file": (N, {}, {"train.jsonl": line(prompt="a", response="b") + line(instruction="c", output="d")}, "train.jsonl: line 2: no columns 'prompt' and 'response', only instruction, output"),
    "messages written as text": (N, {}, {"train.jsonl": line(messages="[]")}, "line 1, column 'messages': is text, not a list of messages; save the table as .jsonl"),
    "no messages": (N, {}, {"train.jsonl": line(messages=[])}, "line 1, column 'messages': not a list of two or more messages; write"),
    "an answer alone": (N, {}, {"train.jsonl": chat(("assistant", "b"))}, "not a list of two or more messages"),
    "a blank answer": (N, {}, {"train.jsonl": chat(("user", "a"), ("assistant", " "))}, "line 1, column 'messages': message 2 has no content"),
    "an answer in parts": (N, {}, {"train.jsonl": chat(("user", [{"type": "text"}]), ("assistant", "b"))}, "column 'messages': the content of message 1 is [{'type': 'text'}], not text; write"),
    "a tool's turn": (N, {}, {"train.jsonl": chat(("user", "a"), ("tool", "b"), ("assistant", "c"))}, "message 2 has the role 'tool', not one of system, user, assistant"),
    "a role in a list": (N, {}, {"train.jsonl": line(messages=[{"role": ["user"], "content": "a"}, {"role": "assistant", "content": "b"}])}, "message 1 has the role ['user'], not one of system, user, assistant"),
    "a role that is an object": (N, {}, {"train.jsonl": line(messages=[{"role": {}, "content": "a"}, {"role": "assistant", "content": "b"}])}, "message 1 has the role {}, not one of system"),
    "one row": (N, {}, {"data.jsonl": line(prompt="a", response="b")}, "data.jsonl: 1 rows are too few to set some apart"),
    # files
    "two files of a split that differ in kind": (C, {}, GOOD | {"train.jsonl": ONE_JSON}, "train.csv and train.jsonl: both are the train split; keep one"),
    "a part that is missing": (C, {}, {"train-00000-of-00002.csv": GOOD["train.csv"]}, "train-00000-of-00002.csv: 1 of its 2 parts are there; fetch the others"),
    "a part of other columns": (C, {}, {"train-00000-of-00002.csv": GOOD["train.csv"], "train-00001-of-00002.csv": "a,label\n1,x\n"}, "train-00001-of-00002.csv: no column 'text'"),
}
# fmt: on


def check_line(caught, folder, said: str) -> None:
    message = str(caught.value).replace(str(folder), "HERE")
    assert said in message and message.isprintable() and len(message) < 400, message


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_table_is_answered_in_one_line(what, tmp_path):
    name, options, files, said = WRONG[what]
    with pytest.raises(tasks.TaskError) as caught:
        rows_of(tmp_path, files, name, options)
    check_line(caught, tmp_path, said)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "train.csv: a folder; move it away"),
        (lambda path: path.symlink_to("nowhere"), "train.csv: a link to a file that is not there"),
    ],
)
def test_what_is_no_file_is_named(make, said, tmp_path):
    make(tmp_path / "train.csv")
    with pytest.raises(tasks.TaskError) as caught:
        find_files(str(tmp_path), C)
    check_line(caught, tmp_path, said)


@pytest.mark.parametrize("which", ["iterdir", "open"])
def test_what_may_not_be_read_is_named(which, tmp_path, monkeypatch):
    """As for root, who runs the tests in containers, everything may be read, the refusal is imitated."""
    (tmp_path / "train.csv").write_text(GOOD["train.csv"])

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), which, refuse)
    with pytest.raises(tasks.TaskError, match=r"cannot be read \(Permission denied\); check that you may read it"):
        find_files(str(tmp_path), C)


@pytest.mark.parametrize(
    "files",
    [
        GOOD | {"train.csv": "\ufeff" + GOOD["train.csv"]},  # a byte-order mark, as Excel writes it
        GOOD | {"train.csv": 'text,label\r\n"a\r\na",x\r\nb,y\r\n'},  # line breaks inside a cell
        GOOD | {"train.csv": ",text,label\n0,a,x\n1,b,y\n"},  # the index that pandas writes
        {"TRAIN.CSV.GZ": gzip.compress(GOOD["train.csv"].encode()), "TEST.CSV": GOOD["test.csv"]},
        GOOD | {"._train.csv": b"\0\5", "README.md": "mine"},
    ],
)
def test_harmless_oddities_are_read(files, tmp_path):
    _, train, scored = rows_of(tmp_path, files)
    assert (len(train), len(scored)) == (2, 2)


def test_whole_numbers_that_pandas_wrote_with_a_point_are_the_same_classes(tmp_path):
    files = {"train.parquet": parquet(text=["a", "b"], label=[0.0, 1.0]), "test.csv": ZEROS["test.csv"]}
    task, train, _ = rows_of(tmp_path, files)
    assert task.labels == ("0", "1") and train["label"] == [0, 1]


def test_spellings_may_be_listed_on_purpose(tmp_path):
    files = {name: content.replace(",x", ",N/A").replace(",y", ",n/a") for name, content in GOOD.items()}
    task, _, _ = rows_of(tmp_path, files, options={"labels": ["N/A", "n/a"]})
    assert task.labels == ("N/A", "n/a")


def test_classes_of_many_digits_are_not_taken_for_one(tmp_path):
    big = "1" + "0" * 40
    files = {name: content.replace(",x", f",{big}").replace(",y", f",{big[:-1]}1") for name, content in GOOD.items()}
    assert len(rows_of(tmp_path, files)[0].labels) == 2


def test_a_test_file_without_labels_may_be_left_out(tmp_path):
    rows = "".join(f"t{i},{'xy'[i % 2]}\n" for i in range(20))
    files = {"train.csv": f"text,label\n{rows}", "test.csv": "text\nc\n"}
    _, train, scored = rows_of(tmp_path, files, options={"scored": "validation"})
    assert (len(train), len(scored)) == (18, 2)


def test_a_quoted_value_is_short_and_on_one_line():
    assert quote("a\nb") == r"'a\nb'" and quote(5) == "5"
    assert quote("a" * 60) == repr("a" * 60) and quote("a" * 61) == repr("a" * 60) + "..."
    assert len(quote(["a" * 999])) < 70


def lone_marks(delimiter: str, order: tuple[int, ...], apart: int) -> str:
    """Return a table of 20 rows; the text of the fourth begins with a quotation mark, one `apart` rows below ends so."""
    texts = [f"a film {n}" for n in range(20)]
    texts[3], texts[3 + apart] = '"Wonderful he said', 'waste of time"'
    rows = [("text", "label"), *((text, str(n % 2)) for n, text in enumerate(texts))]
    return "".join(delimiter.join(row[i] for i in order) + "\n" for row in rows)


@pytest.mark.parametrize("apart", [1, 2, 7])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("delimiter", "name"), [("\t", "train.tsv"), (",", "train.csv")])
def test_quotation_marks_that_swallow_rows_are_refused(delimiter, name, order, apart, tmp_path):
    files = {name: lone_marks(delimiter, order, apart), "test.csv": ZEROS["test.csv"]}
    with pytest.raises(tasks.TaskError) as caught:
        rows_of(tmp_path, files)
    check_line(caught, tmp_path, f"HERE/{name}: lines 5 to {5 + apart} are one field 'text' in quotation marks that ")
    assert "task.options.quotes=false" in str(caught.value)
    assert len(rows_of(tmp_path, files, options={"quotes": False})[1]) == 20


def test_prompts_swallowed_by_quotation_marks_are_refused(tmp_path):
    rows = [f"ask {n}\tsay {n}" for n in range(9)]
    rows[2], rows[6] = '"' + rows[2], 'ask\tsay"'
    with pytest.raises(tasks.TaskError, match="data.tsv: lines 4 to 8 are one field 'prompt'"):
        rows_of(tmp_path, {"data.tsv": "\n".join(["prompt\tresponse", *rows[:6], 'ask 6"\tsay', *rows[7:], ""])}, N)


@pytest.mark.parametrize(
    "text",
    [
        "good food, bad service\nthe rest, too",
        "Dear all,\ngood food, bad service\nbye",
        "one\n\nf(a,b)\n1,000 people",
        "a,b\nc",
        'he said: ""no""\r\nand, well, left',
    ],
)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_texts_of_several_lines_are_texts(order, text, tmp_path):
    rows = [("text", "label"), *((f"plain {n}", "xy"[n % 2]) for n in range(6)), (f'"{text}"', "x")]
    table = "".join(",".join(row[i] for i in order) + "\n" for row in rows)
    _, found, _ = rows_of(tmp_path, GOOD | {"train.csv": table})
    assert len(found) == 7 and found[6]["text"] == text.replace('""', '"')


LEFT_OUT = {
    "an input": ({"prompt": "a", "input": "b", "response": "c"}, "'input'", "prompt", {}),
    "a system turn": ({"prompt": "a", "System": "b", "response": "c"}, "'System'", "prompt", {}),
    "a context": ({"instruction": "a", "context": "b", "output": "c"}, "'context'", "instruction", {}),
    "a passage": ({"prompt": "a", "response": "b", "Passage": "c"}, "'Passage'", "prompt", {}),
    "a document": ({"instruction": "a", "output": "b", "document": "c"}, "'document'", "instruction", {}),
    "a history": (
        {"instruction": "a", "input": "", "output": "c", "history": [["d", "e"]]},
        "'history'",
        "instruction",
        {},
    ),
    "Dolly's context": (
        {"instruction": "a", "context": "b", "response": "c"},
        "'context'",
        "instruction",
        {"prompt": "instruction"},
    ),
    "tools": (
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "tools": [{"name": "f"}],
        },
        "'tools'",
        "messages",
        {},
    ),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_a_column_that_a_prompt_would_leave_out_is_refused(what, tmp_path):
    row, column, into, options = LEFT_OUT[what]
    with pytest.raises(tasks.TaskError) as caught:
        rows_of(tmp_path, {"data.jsonl": line(**row) * 2}, N, options)
    said = (
        f"HERE/data.jsonl: line 1, column {column}: is not part of a prompt made of {into}; merge it into '{into}', or"
    )
    check_line(caught, tmp_path, said)


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TWO_FORMS = {
    "messages": (
        {"prompt": "a", "response": "b", "messages": MESSAGES},
        "'messages' of another form than 'prompt'",
        {},
    ),
    "Alpaca's": (
        {"prompt": "a", "response": "b", "instruction": "c", "output": "d"},
        "'instruction' and 'output' of another form than 'prompt'",
        {},
    ),
    "a part": (
        {"instruction": "a", "output": "b", "Response": "c"},
        "'Response' of another form than 'instruction'",
        {},
    ),
    "a part of two": ({"messages": MESSAGES, "prompt": "c"}, "'prompt' of another form than 'messages'", {}),
    "own names": (
        {"q": "a", "a": "b", "instruction": "c"},
        "'instruction' of another form than 'q'",
        {"prompt": "q", "response": "a"},
    ),
}


@pytest.mark.parametrize("what", TWO_FORMS)
def test_a_second_form_in_a_row_is_refused(what, tmp_path):
    row, columns, options = TWO_FORMS[what]
    with pytest.raises(tasks.TaskError) as caught:
        rows_of(tmp_path, {"data.jsonl": line(**row) * 2}, N, options)
    said = f"HERE/data.jsonl: line 1: {columns} would be left out; keep one form, and remove or rename the columns"
    check_line(caught, tmp_path, said)


@pytest.mark.parametrize(
    "more", [{"prompt": "a "}, {"response": "b"}, {"prompt": "", "output": None}, {"prompt_id": "c", "output": []}]
)
def test_a_column_that_repeats_a_text_of_the_rows_form_is_taken(more, tmp_path):
    other = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    files = {"train.jsonl": line(messages=MESSAGES, **more), "test.jsonl": line(messages=other)}
    assert len(rows_of(tmp_path, files, N)[1]) == 1


@pytest.mark.parametrize("empty", [None, "", " ", [], {}])
def test_an_empty_column_is_not_missed(empty, tmp_path):
    rows = [line(prompt=f"a{n}", response="b", input=empty, system=empty, note="kept out") for n in range(9)]
    assert len(rows_of(tmp_path, {"data.jsonl": "".join(rows)}, N)[1]) == 8


@pytest.mark.parametrize(
    ("column", "word"), [("split", "test"), ("Split", "Dev"), ("set", "valid"), ("split", "validation")]
)
@pytest.mark.parametrize("file", ["reviews.csv", "train.csv"])
def test_rows_that_a_column_calls_test_are_not_trained_on(file, column, word, tmp_path):
    table = f"text,label,{column}\n" + "".join(f"t{n},{n % 2},{'train' if n < 20 else word}\n" for n in range(30))
    with pytest.raises(tasks.TaskError) as caught:
        rows_of(tmp_path, {file: table})
    said = f"HERE/{file}: line 22, column {column!r}: {word!r} is not for training; give one file a split, such as train.csv"
    check_line(caught, tmp_path, said)


def test_a_split_column_that_agrees_with_the_file_is_taken(tmp_path):
    files = {
        f"{split}.csv": f"text,label,split\n{split}1,x,{split}\n{split}2,y,{split}\n" for split in ("train", "test")
    }
    assert len(rows_of(tmp_path, files)[1]) == 2
