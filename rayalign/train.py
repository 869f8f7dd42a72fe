"""The training loop. There is one, and it is not inside an algorithm."""

from __future__ import annotations

from rayalign.checkpoint import TrainerState
from rayalign.metrics import Clock
from rayalign.run import Run


def train(run: Run) -> TrainerState:
    """Sample, score, pair, annotate, credit, update, push; until the last step, or until asked to stop."""
    state = run.restore()
    run.push(state.step)
    run.evaluate_when_due(state.step)
    run.keep_best(state)
    while state.step < run.training.steps and not run.interrupt.requested and not run.converged():
        clock = Clock()
        run.rollouts.start(state.step)
        if run.halted(state.step):
            break
        rollout = run.rollouts.take(state.step)
        examples, metrics = run.algorithm.examples(rollout.groups)
        if examples:
            with clock("annotate"):
                examples, divergence = run.annotate(examples, rollout, state.step)
            examples, credited = run.credit(examples, state)
            with clock("update"):
                metrics |= divergence | credited | run.update(examples, state)
        state = run.after(state, metrics, learned=bool(examples))
        run.refresh(state.step)
        if run.needs_push(state.step):
            run.rollouts.settle()
            with clock("sync"):
                metrics |= run.push(state.step, rollout)
        run.record(state.step, metrics | clock.stop(), rollout)
        run.check_learning(state, metrics, rollout)
        run.save_when_due(state)
        run.evaluate_when_due(state.step)
        run.keep_best(state)
    run.save(state)
    run.finish(state)
    return state
