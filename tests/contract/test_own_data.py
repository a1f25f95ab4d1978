"""Text that people bring: conversations, instructions, tables, packed files, mixtures; each mistake is one sentence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.api.prompts import read_prompts
from shoal.cli import app
from shoal.data import Data, load_data
from shoal.data.mixture import apportion, fitting
from shoal.data.spelled import Part, keyed, located, read, short, templated, told_apart
from shoal.errors import DataError, ShoalError, UsageError

from .test_api import byte_tokenizer, folder  # noqa: F401

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}"
)
DEAF = "{% for m in messages if m.role != 'system' %}<{{ m.content }}>{% endfor %}"
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TURNS[1]]
WRITTEN = "<|user|>\nhi</s>\n<|assistant|>\nhello</s>\n"


def tokenizer(template: str | None = CHATML) -> Any:
    made = byte_tokenizer()
    made.chat_template = template
    return made


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def file(place: Path, name: str, content: str | bytes) -> Path:
    (place / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return place / name


def text_of(data: Data, template: str | None = CHATML) -> str:
    return str(tokenizer(template).decode(data.ids.flatten()))


def whole(source: Any, template: str | None = CHATML, **options: Any) -> str:
    """All of a source's text: windows of two tokens, of which an odd last one is lost."""
    return text_of(load_data(source, tokenizer(template), length=2, limit=10**6, **options))


def code_of(source: Any, template: str | None = CHATML, **options: Any) -> str:
    with pytest.raises(ShoalError) as caught:
        load_data(source, tokenizer(template), length=2, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TURNS}, WRITTEN),
        ({"messages": PARTS}, WRITTEN),
        ({"conversations": SHAREGPT}, WRITTEN),
        ({"conversations": TURNS, "system": "be"}, f"<|system|>\nbe</s>\n{WRITTEN}"),
        ({"prompt": "hi", "response": "hello"}, WRITTEN),
        ({"prompt": "hi", "completion": "hello"}, WRITTEN),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, WRITTEN),
        ({"instruction": "hi", "input": "", "output": "hello"}, WRITTEN),
        ({"instruction": "h", "input": "i", "output": "hello"}, WRITTEN.replace("hi", "h\n\ni")),
        ({"question": "hi", "answer": "hello"}, WRITTEN),
        ({"text": "plain", "messages": TURNS}, "plain\n\nplain"),
    ],
    ids=str,
)
def test_rows_of_every_usual_shape_go_through_the_template(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    once = expected if "text" in row else expected + expected
    for name, content in (("a.jsonl", lines(row, row)), ("a.json", json.dumps([row, row], indent=1))):
        found = whole(file(tmp_path, name, content))
        assert once.startswith(found) and len(once) - len(found) < 2


def test_the_spans_of_the_assistant_are_known(tmp_path: Path) -> None:
    rows = lines({"messages": [*TURNS, {"role": "user", "content": "so"}, {"role": "assistant", "content": "bye"}]})
    data = load_data(file(tmp_path, "a.jsonl", rows), tokenizer(), length=2, limit=10**6)
    assert data.answers is not None
    assert data.answers.shape == data.ids.shape
    assert tokenizer().decode(data.ids[data.answers]) == "hello</s>bye</s>"
    assert data.only([1, 0]).answers is not None
    pair = file(tmp_path, "b.jsonl", lines({"prompt": "hi", "response": "hello"}))
    plain = load_data(pair, tokenizer(None), length=2, limit=10**6)
    assert plain.answers is not None
    assert tokenizer().decode(plain.ids[plain.answers]) == "hell"  # the last odd token is in no window
    assert text_of(plain) == "hi\n\nhell"
    assert load_data(["some text"], tokenizer(), length=2).answers is None


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "ab"}, {"text": "cd"}]', '{"data": [{"text": "ab"}, {"text": "cd"}], "version": 1}',
        '{"train": [{"text": "ab"}, {"text": "cd"}]}', '{"text": "ab"}\n{"text": "cd"}\n', '{"text": "ab\\n\\ncd"}',
    ],
)  # fmt: skip
def test_json_holds_rows_in_the_usual_ways(tmp_path: Path, content: str) -> None:
    assert whole(file(tmp_path, "a.json", content)) == "ab\n\ncd"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,text\r\n1,ab\r\n2,cd\r\n"),
        ("a.csv", '\ufefftext,id\n"ab",1\n\ncd,2\n'), ("a.csv", "id;text\n1;ab\n2;cd\n"),
        ("a.tsv", "id\ttext\n1\tab\n2\tcd\n"), ("a.ndjson", '\ufeff{"text": "ab"}\r\n{"text": "cd"}'),
    ],
)  # fmt: skip
def test_tables_and_byte_order_marks(tmp_path: Path, name: str, content: str) -> None:
    assert whole(file(tmp_path, name, content)) == "ab\n\ncd"
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        assert whole(file(tmp_path, name + suffix, pack(content.encode()))) == "ab\n\ncd"


def test_a_long_cell_and_a_table_of_instructions(tmp_path: Path) -> None:
    assert len(whole(file(tmp_path, "a.csv", f"text\n{'x' * 200_000}\n"))) == 200_000
    assert whole(file(tmp_path, "b.csv", 'prompt,response\nhi,"hello"\n')) == WRITTEN[: len(WRITTEN) // 2 * 2]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", lines(*[{"text": "a"}] * 16, {"body": "b"}), "D408: a.jsonl, line 17 has no key 'text'"),
        ("a.jsonl", lines({"text": "a"}, {"messages": TURNS}), "D488: a.jsonl, line 2 has no 'text', unlike the rows"),
        ("a.jsonl", lines({"messages": TURNS}, {"text": "a"}), "D488: a.jsonl, line 2 has no 'messages', unlike"),
        ("a.jsonl", lines({"prompt": "a", "response": "b"}, {"prompt": "a"}), "D488: a.jsonl, line 2 has no 're"),
        ("a.jsonl", lines({"prompt": "a", "response": None}), "D408: a.jsonl, line 1: 'response' holds a NoneType"),
        ("a.jsonl", lines({"messages": []}), "D487: a.jsonl, line 1: 'messages' holds no message"),
        ("a.jsonl", lines({"messages": "hi"}), "D487: a.jsonl, line 1: 'messages' holds a str"),
        ("a.jsonl", lines({"messages": ["hi"]}), "D487: a.jsonl, line 1: message 1 is a str"),
        ("a.jsonl", lines({"messages": [{"role": "user"}]}), "D487: a.jsonl, line 1: message 1 has no content"),
        ("a.jsonl", lines({"messages": [{"content": "a"}]}), "D487: a.jsonl, line 1: message 1 has no role"),
        ("a.jsonl", lines({"messages": [{"role": "bard", "content": "a"}]}), "D487: a.jsonl, line 1: message 1 has"),
        ("a.jsonl", lines({"messages": [{"role": "user", "content": 1}]}), "D487: a.jsonl, line 1: message 1 holds"),
        (
            "a.jsonl",
            lines({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}),
            "D487: a.jsonl, line 1: message 1 has a part of type 'image'",
        ),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "D407: a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "D404: a.jsonl, line 2 is not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "D404: a.jsonl, line 2 holds half of a UTF-16 pair"),
        ("a.txt", "abc".encode("utf-16"), "D404: a.txt is not UTF-8"),
        ("a.json", "[]", "D404: a.json holds no text"),
        ("a.json", '[{"text": "a"},\n 1]', "D407: a.json, item 2 holds a int"),
        ("a.json", '[{"text": "a"},\n{"text": ]', "D407: a.json, line 2 is not JSON"),
        ("a.json", '{"rows_of_mine": [{"text": "a"}]}', "D407: a.json has its rows under 'rows_of_mine'"),
        ("a.json", "[" * 100_000, "D407: a.json"),
        ("a.csv", "text,id\na,1\nb\n", "D489: a.csv, line 3 has 1 columns, the first line has 2 (text, id)"),
        ("a.csv", "text,id\na,1\nb,c,2\n", "D489: a.csv, line 3 has 3 columns"),
        ("a.csv", 'text,id\n"a,1\n', "D489: a.csv, line 2 is no row of a table"),
        ("a.csv", "text,text\na,b\n", "D489: a.csv has two columns 'text'"),
        ("a.csv", "", "D404: a.csv holds no text"),
        ("a.tsv", "id\tbody\n1\ta\n", "D408: a.tsv, line 2 has no key 'text'; its keys are: id, body; choose one with"),
        ("a.jsonl.gz", b"nothing packed", "D491: a.jsonl.gz is a damaged archive"),
        ("a.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9], "D491: a.txt.gz is a damaged archive"),
        ("a.txt.bz2", b"nothing packed", "D491: a.txt.bz2 is a damaged archive"),
        ("a.txt.xz", b"nothing packed", "D491: a.txt.xz is a damaged archive"),
        ("a.parquet.gz", b"", "D410: a.parquet.gz"),
        ("a.parquet", b"PAR1", "D404: a.parquet is not a parquet file"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_sentence_with_its_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    assert code_of(file(tmp_path, name, content)).startswith(said)


def test_what_a_template_cannot_say(tmp_path: Path) -> None:
    chat = file(tmp_path, "a.jsonl", lines({"messages": TURNS}))
    assert code_of(chat, None).startswith(
        "D485: a.jsonl, line 1 holds messages and the model has no chat template; give"
    )
    assert whole(chat, None, chat_template="plain") == "hi\n\nhell"
    mine = file(tmp_path, "mine.jinja", "{% for m in messages %}{{ m.content }}.{% endfor %}")
    assert whole(chat, None, chat_template=str(mine)) == "hi.hello"
    assert "D492: there is no chat template" in code_of(chat, chat_template=str(tmp_path / "none.jinja"))
    assert "D486: a.jsonl, line 1: the chat template mine.jinja" in code_of(
        chat, chat_template=str(file(tmp_path, "mine.jinja", "{% for"))
    )
    twice = file(tmp_path, "b.jsonl", lines({"messages": TURNS}, {"messages": [TURNS[0], TURNS[0]]}))
    assert code_of(twice, STRICT).startswith("D486: b.jsonl, line 2: the model's chat template does not take these")
    system = file(tmp_path, "c.jsonl", lines({"messages": [{"role": "system", "content": "be"}, *TURNS]}))
    assert "leaves out message 1, whose role is 'system'" in code_of(system, DEAF)
    assert "D493" in code_of(file(tmp_path, "d.jsonl", lines({"text": "a" * 9})), chat_template="plain")


def test_a_key_stands_behind_the_file_or_in_its_option(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({"text": "xxxx", "body": "ab", "talk": TURNS}))
    assert whole(f"{path}:body") == whole(path, text_key="body") == whole(keyed(str(path), "body")) == "ab"
    assert whole(f"{path}:talk") == WRITTEN[: len(WRITTEN) // 2 * 2]
    info = load_data(f"{path}:talk", tokenizer(), length=2).info
    assert info.source == "a.jsonl"
    assert info.describe().startswith("a.jsonl, talk by the model's chat template (")
    assert load_data(path, tokenizer(), length=2).info.how is None
    there = file(tmp_path, "a.jsonl:body", "a file of that name")
    assert whole(str(there)) == "a file of that nam"
    assert code_of(f"{path}:none").startswith(
        "D408: a.jsonl, line 1 has no key 'none'; its keys are: text, body, talk;"
    )
    assert code_of(f"{file(tmp_path, 'a.txt', 'text')}:key").startswith("D408: a.txt is plain text without keys")
    assert code_of(f"{path}:").startswith("D408: ")
    with pytest.raises(UsageError, match="U670: --text-key is for rows"):
        keyed("builtin", "body")


def test_names_are_read_as_they_are_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(r"C:\chats\a.jsonl") == (Part(r"C:\chats\a.jsonl"),)
    assert read(r"C:\chats\a.jsonl:text") == (Part(r"C:\chats\a.jsonl", "text"),)
    assert read("a/b:c:d") == (Part("a/b:c:d"),)
    assert read("runs/lr=0.1.txt") == (Part("runs/lr=0.1.txt"),)
    assert read("a.jsonl:k=0.7, b,c.txt=.3") == (Part("a.jsonl", "k", 0.7), Part("b,c.txt", None, 0.3))
    file(tmp_path, "a=1,b=2", "x")
    assert read("a=1,b=2") == (Part("a=1,b=2"),)
    file(tmp_path, "c.jsonl", "")
    assert located("c.jsonl:k=1,builtin=2") == f"{tmp_path / 'c.jsonl'}:k=1,builtin=2"
    assert located("c.jsonl=1,builtin=2", "body") == f"{tmp_path / 'c.jsonl'}:body=1,builtin=2"
    assert short(f"{tmp_path / 'c.jsonl'}:k=1,builtin=2") == "c.jsonl:k=1,builtin=2"
    assert short("owner/name:config:test") == "name:config:test"
    assert templated("builtin", "plain") == "builtin"
    for text in ("a.txt=0,b.txt=1", "a.txt=-1", "a.txt=nan,b.txt=1", "a.txt=0.5,b.txt", "a.txt=0.5,b.txt=x"):
        with pytest.raises(DataError, match="D490"):
            read(text)


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["/x/a.txt", "/y/b.txt"], ["a.txt", "b.txt"]),
        (["/x/a.txt", "/y/a.txt", "/y/b.txt"], ["x/a.txt", "y/a.txt", "b.txt"]),
        (["/x/1/a.txt", "/y/1/a.txt", "a.txt"], ["x/1/a.txt", "y/1/a.txt", "a.txt"]),
        (["/x/a.jsonl:p", "/x/a.jsonl:q"], ["a.jsonl:p", "a.jsonl:q"]),
        (["/x/a.jsonl:p", "/y/a.jsonl:p"], ["x/a.jsonl:p", "y/a.jsonl:p"]),
        (["/x/a.txt=1,builtin=2", "/y/a.txt=1,builtin=2"], ["x/a.txt=1,builtin=2", "y/a.txt=1,builtin=2"]),
        (["one/text", "two/text"], ["one/text", "two/text"]),
        (["builtin", "builtin"], ["builtin"]),
    ],
)
def test_texts_of_one_file_name_are_told_apart_by_their_folders(texts: list[str], names: list[str]) -> None:
    assert list(told_apart(texts).values()) == names


def test_a_mixture_has_its_shares_in_an_order_drawn_with_the_seed(tmp_path: Path) -> None:
    a, b = file(tmp_path, "a.jsonl", lines({"k": "a" * 200})), file(tmp_path, "b.txt", "b" * 200)
    text = f"{a}:k=0.7,{b}=0.3"
    first, again, other = (load_data(text, tokenizer(), length=4, limit=10, seed=seed) for seed in (1, 1, 2))
    order = ["".join(tokenizer().decode(row)) for row in first.ids]
    assert sorted(order) == ["aaaa"] * 7 + ["bbbb"] * 3
    assert order != sorted(order)
    assert first.ids.equal(again.ids)
    assert not first.ids.equal(other.ids)
    assert first.info.source == "a.jsonl=0.7,b.txt=0.3"
    assert first.info.how == "a.jsonl: key k"
    assert first.info.sha256 != other.info.sha256
    file(tmp_path, "b.txt", "b" * 9)  # two windows: 0.3 of eight, rounded
    assert load_data(text, tokenizer(), length=4, limit=10).info.count == 8
    assert "D490" in code_of(text, limit=2, stride=1)
    assert "D490: of 2 windows a weight of 0.01 of the whole is none; use --limit 100" in code_of(
        f"{a}:k=0.99,{b}=0.01", limit=2
    )
    assert "a.jsonl=0.7,b.txt=0.3" in code_of(f"{a},{b}")


def test_shares_add_up() -> None:
    assert apportion(10, [0.7, 0.3]) == [7, 3]
    assert apportion(3, [1 / 3] * 3) == [1, 1, 1]
    assert apportion(16, [0.5, 0.25, 0.25]) == [8, 4, 4]
    assert fitting([50, 50], [3, 50], [0.5, 0.5]) == [3, 3]
    assert fitting([9, 1], [5, 1], [0.9, 0.1]) == [5, 1]


VERBS = ["measure", "evaluate", "prune"]
DATA = ["chat.jsonl", "alpaca.json", "table.csv", "packed.jsonl.gz", "both", "keyed"]


@pytest.mark.parametrize(("verb", "name"), list(zip(VERBS * 2, DATA, strict=True)))
def test_the_verbs_read_them_all(folder: Path, tmp_path: Path, verb: str, name: str) -> None:  # noqa: F811
    chat = [{"messages": [{"role": "user", "content": "hi " * 40}, {"role": "assistant", "content": "no " * 40}]}]
    alpaca = [{"instruction": "hi " * 40, "output": "no " * 40}]
    file(tmp_path, "chat.jsonl", lines(*chat * 3))
    file(tmp_path, "alpaca.json", json.dumps(alpaca * 3))
    file(tmp_path, "table.csv", f"text\n{'word ' * 60}\n")
    file(tmp_path, "packed.jsonl.gz", gzip.compress(lines(*alpaca * 3).encode()))
    where = {"both": f"{tmp_path / 'chat.jsonl'}=1,{tmp_path / 'table.csv'}=1", "keyed": f"{tmp_path / 'alpaca.json'}"}
    template = file(tmp_path, "t.jinja", CHATML)
    words = [verb, str(folder), "--data", where.get(name, str(tmp_path / name)), "--limit", "2", "--json"]
    words += ["--window", "32", "--no-generation"] if verb == "evaluate" else ["--length", "32"]
    words += ["--drop", "1", "--no-assess"] if verb == "prune" else []
    words += ["--text-key", "output"] if name == "keyed" else []
    words += ["--chat-template", str(template)] if name not in ("table.csv", "keyed") else []
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    said = json.dumps(json.loads(result.stdout))
    how = {"table.csv": "table.csv", "keyed": "key output", "both": "chat.jsonl=1,table.csv=1"}
    assert how.get(name, "by the chat template t.jinja (") in said


@pytest.mark.parametrize("verb", ["measure", "evaluate", "prune", "calibrate", "fit-exits", "fuse", "compare"])
def test_the_command_line_names_the_remedies(folder: Path, tmp_path: Path, verb: str) -> None:  # noqa: F811
    path = file(tmp_path, "c.jsonl", lines({"messages": TURNS} if verb < "f" else {"body": "a"}))
    more = {"fuse": ["--plan", "0-2,4", "--with", "refit"], "prune": ["--drop", "1"]}.get(verb, [])
    more += ["--output", str(tmp_path / "out")] if verb == "compare" else []
    result = CliRunner().invoke(app, [verb, str(folder), "--data", str(path), *more])
    assert result.exit_code == 1, result.output
    assert ("D485" if verb < "f" else "--text-key KEY, or as FILE:KEY") in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    told = CliRunner().invoke(app, [verb, str(folder), "--text-key", "body", *more])
    assert "U670" in told.stderr


def test_a_comparison_and_a_journal_name_their_text(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    file(tmp_path, "a.jsonl", lines({"prompt": "hi " * 50, "response": "no " * 50}))
    data = f"{tmp_path / 'a.jsonl'}=1,builtin=1"
    words = [
        "compare",
        str(folder),
        "--output",
        str(tmp_path / "out"),
        "-m",
        "sleb",
        "-b",
        "layers=0.8",
        "--data",
        data,
    ]
    (tmp_path / "b").mkdir()
    file(tmp_path, "b/a.jsonl", lines({"prompt": "ho " * 50, "response": "yes " * 50}))
    words += [
        "--test-data",
        f"{tmp_path / 'a.jsonl'}:response",
        "--test-data",
        f"{tmp_path / 'b' / 'a.jsonl'}:response",
        "--chat-template",
        "plain",
        "--pairs",
        "0",
        "--new",
        "0",
    ]
    words += ["--length", "32", "--limit", "2", "--window", "32", "--windows", "1", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)["facts"]
    assert facts["protocol"]["data"] == data
    assert facts["protocol"]["chat_template"] == "plain"
    tests = [f"{tmp_path.name}/a.jsonl:response", "b/a.jsonl:response"]
    assert list(facts["tests"]) == tests and len(set(facts["tests"].values())) == 2
    assert all(list(row["result"]["perplexity"]) == tests for row in json.loads(result.stdout)["rows"])
    (journal,) = (tmp_path / "out" / "journals").iterdir()
    first = json.loads(journal.read_text().splitlines()[0])
    assert first["text"].startswith("a.jsonl=1,builtin (Python")
    assert "a.jsonl: prompt and response without a chat template" in first["text"]


def test_prompts_are_read_from_rows_too(tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", "\ufeffhi\n\nso"),
        ("a.jsonl", lines({"prompt": "hi"}, {"messages": [{"role": "user", "content": "so"}]})),
        ("a.json", json.dumps([{"instruction": "hi"}, {"conversations": [{"from": "human", "value": "so"}]}])),
        ("a.csv", "question\nhi\nso\n"),
    ):
        assert read_prompts(file(tmp_path, name, content)) == ["hi", "so"]
    with pytest.raises(DataError, match=r"D408: b\.jsonl, line 1 has no key 'prompt'"):
        read_prompts(file(tmp_path, "b.jsonl", lines({"body": "a"})))
    with pytest.raises(DataError, match="D487"):
        read_prompts(file(tmp_path, "b.jsonl", lines({"messages": [{"role": "system", "content": "a"}]})))
