"""What a run would be, before it starts: `rayalign plan CONFIG`. Nothing is started and no weights are read."""

from __future__ import annotations

from dataclasses import replace

from rayalign.checks import check_labelling, check_training
from rayalign.opponents import settled
from rayalign.plan.advice import nearest_change
from rayalign.plan.batches import data_lengths, data_problems, prompt_lengths, tokens_of_a_step
from rayalign.plan.differences import differences
from rayalign.plan.fit import evaluate
from rayalign.plan.learners import checkpoint_bytes
from rayalign.plan.nodes import find_nodes
from rayalign.plan.records import GIB, Disk, Plan, Rows
from rayalign.plan.servers import notes_of_servers
from rayalign.plan.shapes import read_shape
from rayalign.plan.show import print_plan
from rayalign.record import flat
from rayalign.schema import Config

__all__ = ["Plan", "make_plan", "print_plan"]


def make_plan(config: Config, *, nodes: str | None = None, rows: Rows | None = None) -> Plan:
    """Where actors would go, what a step would do, and whether it fits.

    Args:
        nodes: as `2x8xH100`, see `plan.nodes`; none: the cluster that the config or RAY_ADDRESS names, else this
            machine.
        rows: what data.examples will hold, of data that are not there yet.

    Raises:
        ConfigError: nodes or a model that cannot be read, or a config that no machine could run.
    """
    model, network = config.model, config.algorithm.network
    labels = len(getattr(config.algorithm, "classes", ())) or 1
    shape = read_shape(model.path, network=network, labels=labels, trust_remote_code=model.trust_remote_code)
    (check_training if config.learns else check_labelling)(config)
    there, source = find_nodes(config.placement, nodes)
    lengths = data_lengths(config) if rows is None else replace(prompt_lengths(config), rows=rows)
    config = settled(config, lengths.rows.training if lengths.rows else None)
    fit = evaluate(config, shape, lengths, there)
    fit = replace(fit, notes=(*fit.notes, *notes_of_servers(config)))
    size = checkpoint_bytes(config, shape) / GIB if config.learns else 0.0
    differs = differences(config)
    standing = min(fit.batches.checkpoints, config.checkpoint.keep + 1)
    return Plan(
        model=config.model.path,
        shape=shape,
        differs=differs,
        defaults={key: value for key, value in flat(config.to_dict()).items() if key not in differs},
        nodes=there,
        nodes_from=source,
        lengths=lengths,
        tokens=tokens_of_a_step(config, lengths, fit.batches),
        disk=Disk(size, size * standing),
        data_problems=data_problems(config, lengths),
        fit=fit,
        advice=None if fit.fits else nearest_change(config, shape, lengths, there),
    )
