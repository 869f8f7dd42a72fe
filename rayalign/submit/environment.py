"""Which environment variables a job needs that do not travel with it: they hold keys."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from rayalign.schema import Config
from rayalign.scorers.mix import parts_of
from rayalign.trackers import MLflow, WeightsAndBiases

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def variables(config: Config, named: Iterable[str]) -> tuple[str, ...]:
    """What has to be set on the cluster, each with what it is for: what the config's scorers and trackers cannot do
    without, what is set here under the trackers' names, and the hub's token.

    Args:
        config: of the job.
        named: texts in it that may be hub ids, as they are no files here.
    """
    found: dict[str, str] = {}
    for key, scorer in parts_of(config.scorer):
        for place, asked in ((key, scorer), (f"{key}.ask", getattr(scorer, "ask", None))):
            if name := getattr(asked, "key_env", None):
                found[name] = f"the key for {place}.url"
    for tracker in config.trackers:
        name = str(getattr(tracker, "name", "")).rpartition(":")[2]
        if isinstance(tracker, WeightsAndBiases) and tracker.mode != "offline":
            found["WANDB_API_KEY"] = "wandb"
        if isinstance(tracker, MLflow) and not tracker.tracking_uri:
            found["MLFLOW_TRACKING_URI"] = "mlflow; else mlflow.db beside the run directory"
        here = (each for each in sorted(os.environ) if name and each.startswith(f"{name.upper()}_"))
        found = dict.fromkeys(here, f"{name}; set here") | found
    if hub := [text for text in named if HUB_ID.fullmatch(text)]:
        found["HF_TOKEN"] = f"{' and '.join(hub)}, unless public"
    return tuple(f"{name} ({purpose})" for name, purpose in sorted(found.items()))
