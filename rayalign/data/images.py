"""Images of a row: what a cell names, whether it can be read, and its tokens in the prompt.

In texts `<image>` is where an image stands; a prompt without it has its images in front of the user's first words.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rayalign.data.tokens import Messages, Turns
from rayalign.errors import DataError
from rayalign.types import Picture

MARK = "<image>"
Found = Path | bytes  # a file, or what stands in one
Size = tuple[int, int]
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def images_of(value: Any, folder: Path, where: str) -> tuple[Found, ...]:
    """The images of a cell: a path, bytes, what `datasets` makes of its Image feature, an image of PIL, or a list.

    Args:
        folder: where relative paths start, that of the data file.

    Raises:
        DataError: a cell that is none of these.
    """
    if value is None:
        return ()
    return tuple(_found(each, folder, where) for each in (value if isinstance(value, list | tuple) else [value]))


def size_of(found: Found, where: str) -> Size:
    """Width and height, upright, from the file's head. Raises DataError when it cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(found) if isinstance(found, bytes) else found) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(0x0112) in _TURNED else (width, height)
    except Exception as error:  # PIL raises whatever a broken file makes its decoders raise
        raise _unreadable(found, error, where) from None


def opened(found: Found, where: str) -> Picture:
    """The image as it travels, decoded once to see that it can be. Raises DataError."""
    from PIL import Image

    try:
        data = found if isinstance(found, bytes) else found.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as error:
        raise _unreadable(found, error, where) from None
    return Picture(data, size_of(data, where))


def with_marks(messages: Messages, count: int, where: str) -> list[dict[str, Any]]:
    """Messages in which `<image>` stands as often as there are images. Raises DataError when it is another number."""
    marks = sum(message["content"].count(MARK) for message in messages)
    if marks == count:
        return list(messages)
    if marks:
        raise DataError(
            f"{MARK} does not stand in the prompt once for each image",
            where=where,
            value=f"{marks} × {MARK}, images: {count}",
            rule=f"{MARK} where each image belongs, or nowhere: images then stand in front of the user's first words",
            remedy="correct or drop this row, or set data.on_bad_row=skip",
        )
    first = next(place for place, message in enumerate(messages) if message["role"] == "user")
    shown = {**messages[first], "content": MARK * count + messages[first]["content"]}
    return [*messages[:first], shown, *messages[first + 1 :]]


def flat(value: Any, *, images: bool) -> Any:
    """Messages whose content is a list of parts ({type: image}, {type: text, text: …}) as texts with `<image>` in them.

    Args:
        images: whether the row has any; else parts that are images stay as they are.
    """
    if isinstance(value, list):
        return [flat(each, images=images) for each in value]
    if isinstance(value, dict) and isinstance(value.get("content"), list):
        parts = [part if isinstance(part, dict) else {} for part in value["content"]]
        if all(images if part.get("type") == "image" else isinstance(part.get("text"), str) for part in parts):
            texts = (MARK if part.get("type") == "image" else part["text"] for part in parts)
            return {**value, "content": "".join(texts)}
    return value


class ImageTurns(Turns):
    """A processor's tokenizer and chat template, for prompts in whose texts `<image>` stands for an image.

    Args:
        processor: of a vision-language model, as AutoProcessor loads it.
    """

    def __init__(self, processor: Any, *, chat_template: bool):
        super().__init__(processor.tokenizer, chat_template=chat_template)
        self._processor = processor
        if processor.chat_template:
            self._renderer = processor
        self._image = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        self._expansions: dict[Size, tuple[int, ...]] = {}

    def prompt(self, messages: Messages, where: str, sizes: Sequence[Size] = ()) -> tuple[int, ...]:
        """As Turns.prompt, with as many tokens for each image as one of its size has."""
        if not self.chat_template:
            token = self._processor.image_token
            messages = [{**each, "content": each["content"].replace(MARK, token)} for each in messages]
        ids, left = [], list(sizes)
        for token in super().prompt(messages, where):
            if token == self._image and left:
                ids += self._expanded(left.pop(0), where)
            elif token == self._image:
                raise self._other_number(messages, len(sizes), where)
            else:
                ids.append(token)
        if left:
            raise self._other_number(messages, len(sizes), where)
        return tuple(ids)

    def answer(self, messages: Messages, text: str, where: str) -> tuple[int, ...]:
        """As Turns.answer. Raises DataError also when an answer holds the token of an image."""
        ids = super().answer(messages, text, where)
        if MARK in text or self._image in ids:
            raise DataError(
                "an answer holds an image",
                where=where,
                value=text,
                rule=f"images stand in prompts; {MARK} in an answer has nothing to show",
                remedy="correct or drop this row, or set data.on_bad_row=skip",
            )
        return ids

    @cached_property
    def fingerprint(self) -> str:
        """As Turns.fingerprint, with what decides how many tokens an image has, and which."""
        known = repr([super().fingerprint, self._renderer.chat_template, self._processor.image_processor.to_dict()])
        return hashlib.blake2b(known.encode(), digest_size=16).hexdigest()

    def _content(self, text: str) -> Any:
        if self._renderer is self.tokenizer:
            return text.replace(MARK, self._processor.image_token)
        parts: list[dict[str, str]] = []
        for place, piece in enumerate(text.split(MARK)):
            parts += [{"type": "image"}] if place else []
            parts += [{"type": "text", "text": piece}] if piece else []
        return parts

    def _expanded(self, size: Size, where: str) -> tuple[int, ...]:
        """The tokens of an image, which its size decides: those of an empty one."""
        if size not in self._expansions:
            from PIL import Image

            try:
                found = self._processor(
                    text=[self._processor.image_token], images=[Image.new("RGB", size)], add_special_tokens=False
                )
            except ValueError as error:
                raise DataError(
                    "the model's processor refuses this image",
                    where=where,
                    value=f"{size[0]} × {size[1]} pixels",
                    rule=f"what it takes: {error}",
                    remedy="resize or drop this image, or set data.on_bad_row=skip",
                ) from error
            self._expansions[size] = tuple(found["input_ids"][0])
        return self._expansions[size]

    def _other_number(self, messages: Messages, count: int, where: str) -> DataError:
        return DataError(
            "the prompt has another number of image tokens than images",
            where=where,
            value=f"images: {count}; roles {', '.join(m['role'] for m in messages)}",
            rule=f"one {self._processor.image_token} an image once the chat template is applied",
            remedy=f"take {self._processor.image_token} out of the texts, or use a chat template that shows images",
        )


def undecoded(features: Any) -> None:
    """Tell features of `datasets` to leave images as bytes, which are light and still say what they are."""
    if isinstance(features, Mapping):
        for each in features.values():
            undecoded(each)
    elif hasattr(features, "decode"):
        features.decode = False
    elif hasattr(features, "feature"):
        undecoded(features.feature)


def _found(value: Any, folder: Path, where: str) -> Found:
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value.strip():
        return folder / Path(value).expanduser()
    if hasattr(value, "save") and hasattr(value, "getexif"):  # an image of PIL
        file = io.BytesIO()
        value.save(file, "PNG")
        return file.getvalue()
    raise DataError(
        "this is not an image",
        where=where,
        value="nothing (null)" if value is None else str(value)[:80],
        rule="the path of a file, bytes of one, or an image as `datasets` keeps it; or a list of them",
        remedy="correct or drop this row, or set data.on_bad_row=skip",
    )


def _unreadable(found: Found, error: Exception, where: str) -> DataError:
    name = f"{len(found)} bytes that begin with {found[:8]!r}" if isinstance(found, bytes) else str(found)
    missing = isinstance(error, FileNotFoundError)
    return DataError(
        "an image cannot be read",
        where=where,
        value=name,
        rule="a file that is there; relative paths start at the folder of the data file"
        if missing
        else f"an image that PIL can read; it says: {type(error).__name__}: {error}"[:300],
        remedy="correct the path, drop this row, or set data.on_bad_row=skip"
        if missing
        else "write the image again, drop this row, or set data.on_bad_row=skip",
    )
