"""Training: the set-up, then the loop, top to bottom. The step is in `step`, what it compiles to in `builder`."""

import contextlib
import signal
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from llava_jax import cli
from llava_jax.checkpoint.training import TrainingCheckpoints
from llava_jax.cli import UserError
from llava_jax.files.lock import hold
from llava_jax.parallel import compilation_cache, distributed
from llava_jax.training import config_check
from llava_jax.training.evaluation import make_evaluations
from llava_jax.training.goodput import Goodput
from llava_jax.training.report import Callback, Reporter, count_tokens
from llava_jax.training.setup import load, set_up
from llava_jax.training.signals import catch_signals
from llava_jax.training.summary import print_summary


def train(
    config: ConfigDict, workdir: str, resume_from: int | None = None, *, callbacks: Sequence[Callback] = ()
) -> None:
    """Trains one stage, with the arguments and errors of `run.train`. Process 0 calls the callbacks."""
    goodput = Goodput()
    config_check.check(config)
    directory = epath.Path(workdir)
    lock = hold(directory) if distributed.is_first() else contextlib.nullcontext(lambda: None)
    with lock as check_lock, contextlib.ExitStack() as closing:  # `check_lock` raises UserError if the lock is lost
        distributed.barrier("lock")
        # ---- Set-up: all errors in the configuration and in the texts are raised here
        compilation_cache.use(config.compilation_cache)
        run = set_up(config, directory, resume_from)
        checkpoints = TrainingCheckpoints(directory, run.description, config.keep)
        state, frozen = load(run, checkpoints, goodput)
        print_summary(run, state, frozen)

        # ---- What reports, evaluates and stops the run
        start, steps, data = run.start.step, run.steps, run.data
        goodput.open(directory, start)
        reporter = Reporter(run, checkpoints, goodput, callbacks, check_lock)
        evaluations = make_evaluations(run, reporter, goodput)
        signals = distributed.SignalSync(run.mesh)
        closing.callback(reporter.write_goodput)
        closing.callback(checkpoints.close)
        closing.push(distributed.exit_on_error)  # closing the checkpoints waits for all processes
        closing.callback(reporter.close)
        closing.enter_context(goodput.measure("step"))
        request = closing.enter_context(catch_signals())

        # ---- Evaluations of the first step: a crash or a signal may have come between saving a step and evaluating it
        for evaluation in evaluations:
            if evaluation.due(start) and not any(name.startswith(evaluation.metrics) for name in reporter.written):
                evaluation.run(start, state.weights, frozen)

        # ---- The loop
        batches = run.batches(data.order).iterate(start, steps, config.data.workers)
        for step, (batch, rows, bad) in enumerate(goodput.waiting("data", batches), start + 1):
            last = step == steps
            if step == start + 1:
                with goodput.measure("compile"):
                    train_step = run.program.lower().compile()
            with goodput.measure("profile"):
                reporter.profile.begin(step)
            with reporter.profile.step(step):
                state, metrics = train_step(state, frozen, run.put(batch))
            reporter.flush()  # the step before, so that the device never waits for the host
            reporter.hold(step, metrics, count_tokens(data.lengths, rows, data.layout))
            reporter.bad.advance(rows)
            reporter.bad.note(step, bad)

            # What all processes do together after this step.
            stop, any_bad = signals.exchange(request.signal or 0, len(reporter.bad.pending))
            # After a signal, the next start evaluates.
            due = [each for each in evaluations if each.due(step) and (last or not stop)]
            save = last or bool(stop) or step % config.save_every == 0
            if any_bad or save:
                reporter.share_bad(f"step {step}")
            verdict = reporter.bad.verdict()
            if save or verdict or due:
                reporter.flush()  # nothing is saved before its loss is known to be finite
            if save or verdict:
                check_lock()
                with goodput.measure("checkpoint"):
                    checkpoints.save(step, *state[1:], wait=bool(last or stop or verdict))
                    goodput.write()
                reporter.upload()
            if verdict:
                error = UserError(f"step {step}, which is saved: {verdict}")
                cli.report(error)
                raise distributed.ExitTogether(1) from error
            for evaluation in due:
                evaluation.run(step, state.weights, frozen)
            if stop and not last:
                name = signal.Signals(stop).name
                reporter.say(f"stopped by {name} at step {step}, which is saved; the same command resumes")
                raise distributed.ExitTogether(128 + stop)
    reporter.say_done()
