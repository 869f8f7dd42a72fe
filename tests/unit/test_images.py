"""Rows with images: which file or bytes they are, where they stand in the prompt, and what is wrong with them."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, Features, Image, List, Value
from transformers import AutoProcessor

from rayalign.data.config import DataConfig
from rayalign.data.examples import load_examples
from rayalign.data.images import size_of
from rayalign.errors import DataError
from rayalign.learners.vision import decoded
from tests.tiny_models import build_tokenizer
from tests.tiny_vision import IMAGE_ID, build_tiny_llava, painted, png

ROW = {"prompt": "what is it", "chosen": "a film", "rejected": "an opera"}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return AutoProcessor.from_pretrained(build_tiny_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture
def load(tmp_path, processor):
    """Data sets of these rows, written beside a.png and b.png."""
    for seed, name in enumerate("ab"):
        painted(seed, 24 + 8 * seed, 20).save(tmp_path / f"{name}.png")

    def load(rows, *, images=True, tokenizer=processor.tokenizer, seeing=lambda: processor, max_tokens=80, **settings):
        if not isinstance(rows, str):
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(json.dumps(each) + "\n" for each in rows))
            rows = str(path)
        config = DataConfig(examples=rows, held_out=0.0, **settings)
        return load_examples(
            config,
            tokenizer,
            kinds=("pair",),
            max_tokens=max_tokens,
            seed=0,
            processor=seeing,
            images=images,
        )

    return load


def one(load, row, **settings):
    (group,) = load([row], **settings).step(0, 1)
    return group


def text(processor, group):
    return processor.tokenizer.decode(group.prompt.token_ids)


def test_tokens_are_those_that_the_processor_makes(load, processor):
    group = one(load, ROW | {"images": ["a.png"]})
    parts = [{"type": "image"}, {"type": "text", "text": ROW["prompt"]}]
    rendered = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    want = processor(text=[rendered], images=[painted(0)])["input_ids"][0]
    assert list(group.prompt.token_ids) == want and want.count(IMAGE_ID) == 4
    (picture,) = group.prompt.images
    assert picture.size == (24, 20) and picture.box is None
    assert decoded(picture).tobytes() == painted(0).tobytes()
    assert "images" not in group.prompt.extra
    assert processor.tokenizer.decode(group.completions[0].token_ids) == "a film<eos>"


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("look: <image> and <image>.", "<user>look: II and II.<assistant>"),
        ("look", "<user>IIIIlook<assistant>"),
        (
            [{"role": "system", "content": "be kind"}, {"role": "user", "content": "look"}],
            "<user>be kind<user>IIIIlook<assistant>",
        ),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image", "text": None}],
                }
            ],
            "<user>IIorII<assistant>",
        ),
    ],
)
def test_where_images_stand(load, processor, prompt, want):
    group = one(load, ROW | {"prompt": prompt, "images": ["a.png", "b.png"]})
    assert text(processor, group) == want.replace("I", "<image>" * 2)
    assert [each.size for each in group.prompt.images] == [(24, 20), (32, 20)]


def test_answers_in_parts(load, processor):
    """As data sets for vision-language models have them: messages in parts, in all columns."""

    def message(role, *parts):
        return [{"role": role, "content": [{"type": "text", "text": t} if t else {"type": "image"} for t in parts]}]

    row = {"prompt": message("user", "", "what is it"), "chosen": message("assistant", "a film")}
    group = one(load, row | {"rejected": message("assistant", "an opera"), "images": ["a.png"]})
    assert text(processor, group) == "<user>" + "<image>" * 4 + "what is it<assistant>"
    assert group.texts == ("a film", "an opera")


def test_without_a_template_the_tokens_stand_in_the_text(load, processor):
    group = one(load, ROW | {"prompt": "see <image>: ", "image": "a.png"}, chat_template=False)
    assert text(processor, group) == "see " + "<image>" * 4 + ": "


def test_images_of_a_saved_data_set(load, tmp_path, processor):
    features = Features({name: Value("string") for name in ROW} | {"images": List(Image())})
    rows = [ROW | {"images": [painted(seed), painted(seed + 1)]} for seed in range(3)]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    for stream in (False, True):
        for name in ("saved", "rows.parquet"):
            loaded = load_examples(
                DataConfig(examples=[{"path": str(tmp_path / name), "stream": stream}], held_out=0.0),
                processor.tokenizer,
                kinds=("pair",),
                max_tokens=80,
                seed=0,
                processor=lambda: processor,
            )
            groups = {group.prompt.index: group for group in loaded.step(0, 3)}
            shown = [decoded(each).tobytes() for each in groups[1].prompt.images]
            assert shown == [painted(1).tobytes(), painted(2).tobytes()]


def test_a_turned_photograph_stands_upright(tmp_path):
    image = painted(0, 24, 16)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert size_of(tmp_path / "a.jpg", "here") == (16, 24)


def test_a_prompt_with_images_is_not_cut_but_the_answer_is(load):
    loaded = load([ROW | {"images": ["a.png"], "chosen": "film " * 40}], max_tokens=40)
    (group,) = loaded.step(0, 1)
    assert group.prompt.token_ids.count(IMAGE_ID) == 4 and loaded.counts["truncated"] == 1
    assert len(group.prompt.token_ids) + len(group.completions[0].token_ids) == 40
    assert group.completions[0].finish_reason == "length"


BAD = {
    "no image": (ROW | {"images": []}, "a row has no image", "images: 0"),
    "null": (ROW | {"images": None}, "a row has no image", "images: 0"),
    "no such file": (ROW | {"images": ["c.png"]}, "an image cannot be read", "c.png"),
    "not an image": (ROW | {"images": ["rows.jsonl"]}, "an image cannot be read", "rows.jsonl"),
    "a number": (ROW | {"images": [7]}, "this is not an image", "7"),
    "too many marks": (ROW | {"images": ["a.png"], "prompt": "<image> <image>"}, "once for each image", "2 × <image>"),
    "an image in an answer": (
        ROW | {"images": ["a.png"], "rejected": "<image>"},
        "an answer holds an image",
        "<image>",
    ),
    "long": (ROW | {"images": ["a.png"], "prompt": "film " * 90}, "a prompt fills the context", "tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_or_skipped(load, case):
    row, what, value = BAD[case]
    good = ROW | {"images": ["a.png"]}
    with pytest.raises(DataError, match=what) as caught:
        load([good, row])
    assert str(caught.value.where).endswith("rows.jsonl:2") and value in str(caught.value.value)
    assert caught.value.rule and "on_bad_row=skip" in caught.value.remedy
    loaded = load([good, row], on_bad_row="skip")
    assert loaded.rows == 1 and loaded.counts["skipped"] == 1


def test_a_file_that_is_cut_off_is_found_when_the_row_is_taken(load, tmp_path):
    whole = png(painted(0, 200, 200))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="an image cannot be read") as caught:
        load([ROW | {"images": ["cut.png"]}]).step(0, 1)
    assert str(caught.value.where).endswith("rows.jsonl:1")


def test_a_text_model_and_images(load):
    with pytest.raises(DataError, match="nothing here sees them"):
        load([ROW | {"images": ["a.png"]}], seeing=None, tokenizer=build_tokenizer())


def test_data_without_a_column_of_images(load):
    with pytest.raises(DataError, match="no column with images"):
        load([ROW])
    assert one(load, ROW, images=False, tokenizer=build_tokenizer(), chat_template=False).prompt.images == ()


def test_rows_with_and_without_images(load):
    rows = [ROW | {"images": ["a.png"]}, ROW | {"images": []}]
    groups = load(rows, images=False).step(0, 2)
    assert sorted(len(group.prompt.images) for group in groups) == [0, 1]
    with pytest.raises(DataError, match="the first one has no such column"):
        load([ROW, ROW | {"images": ["a.png"]}], images=False, tokenizer=build_tokenizer())


def test_a_model_that_sees_reads_texts_alone(load, processor):
    """Its template takes lists of parts only, and would drop a text without a word."""
    assert "what is it" not in processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is it"}], tokenize=False
    )
    group = one(load, ROW, images=False)
    assert text(processor, group) == "<user>what is it<assistant>"
    assert processor.tokenizer.decode(group.completions[0].token_ids) == "a film<eos>"


def test_the_fingerprint_knows_the_processor(load, processor):
    rows = [ROW | {"images": ["a.png"]}]
    first = load(rows).fingerprint
    assert load(rows).fingerprint == first
    before = processor.image_processor.crop_size
    processor.image_processor.crop_size = {"height": 24, "width": 24}
    try:
        assert load(rows).fingerprint != first
    finally:
        processor.image_processor.crop_size = before
