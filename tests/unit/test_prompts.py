"""Prompt files: what is read, and how a bad one is refused."""

from __future__ import annotations

import json

import pytest

from rayalign.data.prompts import DataConfig, load_prompts
from rayalign.errors import DataError
from tests.tiny_models import build_tokenizer

ROWS = [{"prompt": f"film {i}", "genre": "space opera"} for i in range(10)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def load(tokenizer, path, room=50, **settings):
    return load_prompts(DataConfig(prompts=str(path), **settings), tokenizer, max_prompt_tokens=room)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_is_split_templated_and_keeps_other_columns(tokenizer, tmp_path):
    prompts = load(tokenizer, write(tmp_path / "p.jsonl", ROWS), held_out=0.2)
    assert (len(prompts.training), len(prompts.held_out), prompts.skipped) == (8, 2, 0)
    first = prompts.training[0]
    assert tokenizer.decode(first.token_ids) == f"<user>{first.text}<assistant>"
    assert first.extra == {"genre": "space opera"}
    assert {p.index for p in prompts.training}.isdisjoint(p.index for p in prompts.held_out)
    assert load(tokenizer, tmp_path / "p.jsonl", held_out=0.2) == prompts
    assert load(tokenizer, tmp_path / "p.jsonl", held_out=0.2, shuffle_seed=1).held_out != prompts.held_out


def test_a_prompt_that_is_too_long_does_not_move_the_split(tokenizer, tmp_path):
    """Stages with other contexts hold out the same prompts: none learns from what another is measured on."""
    for long in range(0, 10, 3):
        rows = [{"prompt": f"film {i}" + " and more" * 20 * (i == long)} for i in range(10)]
        file = write(tmp_path / "p.jsonl", rows)
        whole = load(tokenizer, file, room=10**6, held_out=0.3)
        short = load(tokenizer, file, long_prompts="skip", held_out=0.3)
        assert short.skipped == 1 and whole.skipped == 0
        assert {p.index for p in short.held_out} == {p.index for p in whole.held_out} - {long}
    rows = [{"prompt": "a film"}, {"prompt": "b film"}, *({"prompt": "film and more" * 50},) * 30]
    found = load(tokenizer, write(tmp_path / "p.jsonl", rows), long_prompts="skip", held_out=0.1)
    assert (len(found.training), len(found.held_out)) == (1, 1)


def test_csv_parquet_json_and_chat_messages(tokenizer, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,genre\n" + "".join(f"{r['prompt']},x\n" for r in ROWS))
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet(tmp_path / "p.parquet")
    whole = load(tokenizer, write(tmp_path / "p.jsonl", ROWS))
    for name in ("p.csv", "p.json", "p.parquet"):
        found = load(tokenizer, tmp_path / name)
        assert [p.token_ids for p in found.training] == [p.token_ids for p in whole.training], name
    chat = [{"q": [{"role": "user", "content": r["prompt"]}]} for r in ROWS]
    found = load(tokenizer, write(tmp_path / "chat.jsonl", chat), prompt_column="q")
    assert [p.token_ids for p in found.training] == [p.token_ids for p in whole.training]


def test_without_template_the_text_is_continued(tokenizer, tmp_path):
    prompts = load(tokenizer, write(tmp_path / "p.jsonl", ROWS), chat_template=False)
    assert tokenizer.decode(prompts.training[0].token_ids) == prompts.training[0].text


def test_long_prompts_are_counted_or_refused(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", [*ROWS, {"prompt": "a" * 60}])
    assert load(tokenizer, path).skipped == 1
    with pytest.raises(DataError, match=r"row 11.*no room") as error:
        load(tokenizer, path, long_prompts="refuse")
    assert "62 tokens" in str(error.value)
    assert "at most 50" in str(error.value)
    with pytest.raises(DataError, match="every prompt is too long"):
        load(tokenizer, path, room=2)


@pytest.mark.parametrize(
    ("content", "settings", "expected"),
    [
        (None, {}, "there is no such file"),
        ("", {}, "this file is empty"),
        ("\n\n", {}, "not one row"),
        ('{"prompt": "a"}\n{"prompt": "b"\n', {}, r"p.jsonl:2: this line is not JSON"),
        ('["a"]\n', {}, r"p.jsonl:1: this is not a JSON object"),
        ('{"text": "a"}\n', {}, r"no column 'prompt'.*\n.*columns text"),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}\n', {}, "row 1: these messages do not end with the user"),
        ('{"promt": "a"}\n', {}, "did you mean promt"),
        ('{"prompt": "a"}\n{"x": 1}\n', {}, "row 2: there is no column"),
        ('{"prompt": "  "}\n', {}, "row 1: this is not a prompt"),
        ('{"prompt": 7}\n', {}, "row 1: this is not a prompt"),
        ('{"prompt": [{"role": "user"}]}\n', {}, "row 1: this is not a prompt"),
    ],
)
def test_bad_files_are_refused_with_the_row(tokenizer, tmp_path, content, settings, expected):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=expected):
        load(tokenizer, path, **settings)


def test_folder_bad_csv_and_unknown_hub_id(tokenizer, tmp_path):
    with pytest.raises(DataError, match="this is a folder"):
        load(tokenizer, tmp_path)
    (tmp_path / "p.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"this file is not parquet"):
        load(tokenizer, tmp_path / "p.parquet")
    with pytest.raises(DataError, match="could not be loaded"):
        load(tokenizer, "no_such_owner_here/no_such_data")


def test_a_file_in_another_encoding_is_named_with_its_line(tokenizer, tmp_path):
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "a"}\n{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"p.jsonl:2: this line is not UTF-8"):
        load(tokenizer, tmp_path / "p.jsonl")


def test_no_chat_template_is_explained(tokenizer, tmp_path):
    bare = build_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match=r"data.chat_template=false"):
        load(bare, write(tmp_path / "p.jsonl", ROWS))


def test_what_scorers_are_shown_is_the_whole_conversation(tokenizer, tmp_path):
    told = [{"role": "user", "content": "My cat is Tom."}, {"role": "assistant", "content": "Nice."}]
    file = write(tmp_path / "p.jsonl", [{"prompt": [*told, {"role": "user", "content": "Its name?"}]}, {"prompt": "x"}])
    first, second = load(tokenizer, file, room=10**6, held_out=0.0).training
    assert first.conversation == "User: My cat is Tom.\n\nAssistant: Nice.\n\nUser: Its name?"
    assert first.text == "Its name?" and second.conversation == second.text == "x"
    french = load(tokenizer, file, room=10**6, held_out=0.0, system="In French.").training[1]
    assert french.conversation == "System: In French.\n\nUser: x" and french.text == "x"


def test_a_column_that_only_some_rows_have_is_there_for_all(tokenizer, tmp_path):
    """So that what reads it finds the same whichever prompts it is given together."""
    rows = [{"prompt": "a film"}, {"prompt": "b film", "stars": 3}]
    assert [p.extra for p in load(tokenizer, write(tmp_path / "p.jsonl", rows), held_out=0.0).training] == [
        {"stars": None},
        {"stars": 3},
    ]
