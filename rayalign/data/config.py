"""The `data` section of a config: where prompts and examples come from, and how they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema

from rayalign.record import Record, Unfit


class LabelNoise(Record):
    """Noisy annotators: labels of training rows that are turned round, always those of the same rows."""

    kind: Literal["flip", "uniform"] = Field(
        "flip", description="flip: the other label; uniform: one drawn at random, which may be the same"
    )
    prob: float = Field(ge=0, le=1, description="share of the rows that it meets", examples=[0.2])
    seed: int = Field(0, ge=0, lt=2**31, description="with a row's number: whether that row is met")


class SourceConfig(Record):
    """One data set."""

    path: str = Field(
        min_length=1,
        description="a .jsonl, .json, .csv or .parquet file, a folder made by save_to_disk, or a hub id",
        examples=["my_pairs.jsonl"],
    )
    split: str = Field("train", description="of a hub data set, or of a folder with several")
    subset: str | None = Field(None, description="configuration of a hub data set")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    weight: float | None = Field(
        None, gt=0, description="its share of the rows, against the others' weights; none: by its number of rows"
    )
    columns: dict[str, str] = Field({}, description="what a column is → its name here, as {chosen: good_answer}")
    label_noise: LabelNoise | None = Field(None, description="turn some labels round, to try losses on known noise")
    stream: bool = Field(False, description="read as it comes, with a shuffle buffer, rather than open it whole")
    limit: int | None = Field(None, ge=1, description="only the first rows")


class _TextOrList:
    """In a config a text stands for a source with that path, and one source for a list of one."""

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        whole = handler(schema)
        one = [{"type": "string"}, whole["items"]]
        return {"anyOf": [*one, {"type": "array", "items": {"anyOf": one}}]}


def _listed(value: Any) -> Any:
    if value is None:
        return ()
    several = list(value) if isinstance(value, list | tuple) else [value]
    return [_mapping(each) for each in several]


def _mapping(source: Any) -> Any:
    if isinstance(source, str):
        return {"path": source}
    if isinstance(source, dict) and "name" in source and "path" not in source:
        # What a text becomes when an override adds a key beside it: data.examples.columns.chosen=good_answer.
        return {"path" if key == "name" else key: value for key, value in source.items()}
    return source


class DataConfig(Record):
    """Where prompts and examples come from."""

    prompts: str | None = Field(
        None,
        description="prompts to sample from: a .jsonl, .json, .csv or .parquet file, or a hub id",
        examples=["my_prompts.jsonl"],
    )
    examples: Annotated[tuple[SourceConfig, ...], BeforeValidator(_listed), _TextOrList()] = Field(
        (), description="answers to learn from: one or several data sets", examples=["my_pairs.jsonl"]
    )
    split: str = Field("train", description="of a hub data set of prompts")
    prompt_column: str = Field("prompt", description="column of data.prompts with a text, or with chat messages")
    system: str | None = Field(None, description="system message put before every prompt")
    chat_template: bool = Field(True, description="apply the model's chat template (off: continue the text as it is)")
    max_tokens: int = Field(
        1024,
        ge=2,
        description="of an example, prompt and answer; longer ones are cut, as are those beyond the model's context",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="examples that are of no use: stop, or count them"
    )
    held_out: float = Field(0.2, ge=0, lt=1, description="share of prompts and of examples kept for evaluation")
    long_prompts: Literal["skip", "refuse"] = Field(
        "skip", description="prompts that leave no room in the context: skip and count them, or refuse the file"
    )
    shuffle_seed: int = Field(0, ge=0, description="of the split into training and held-out rows")
    shuffle_buffer: int = Field(1000, ge=1, description="rows of a stream among which the next is drawn")

    @model_validator(mode="after")
    def _weights(self) -> DataConfig:
        without = [each.path for each in self.examples if each.weight is None]
        if len(self.examples) > 1 and 0 < len(without) < len(self.examples):
            raise Unfit(
                f"{without[0]} has no weight, and others have one",
                key="examples",
                rule="a weight for each of several sources, or for none of them",
                remedy="give each its weight, or take all weights out to mix by number of rows",
            )
        if len(self.examples) > 1 and without and any(each.stream for each in self.examples):
            raise Unfit(
                "a stream among several sources has no weight",
                key="examples",
                rule="weights, as nobody knows how many rows a stream has",
                remedy="add weight: 1.0 to each source, say",
            )
        return self
