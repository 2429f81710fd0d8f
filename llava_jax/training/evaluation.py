"""What is evaluated while a model is trained: the validation loss, and a benchmark."""

from llava_jax.models.llava import Params
from llava_jax.training.goodput import Goodput
from llava_jax.training.report import Reporter
from llava_jax.training.setup import Run


def make_evaluations(run: Run, reporter: Reporter, goodput: Goodput) -> list["ValidationLoss | BenchmarkScores"]:
    """The evaluations of a run, in the order in which they run after a step."""
    kinds = [ValidationLoss] * (len(run.data.validation.samples) > 0) + [BenchmarkScores] * (run.benchmark is not None)
    return [kind(run, reporter, goodput) for kind in kinds]


class ValidationLoss:
    """The mean loss over the target tokens of the held-out samples. All processes take part, as in any evaluation."""

    metrics = "validation_loss"  # the name of its metrics, or how their names begin

    def __init__(self, run: Run, reporter: Reporter, goodput: Goodput):
        self._run, self._reporter, self._goodput = run, reporter, goodput
        self._batches = run.batches(run.data.validation)
        self._loss_sum = run.program.evaluation()

    def due(self, step: int) -> bool:
        """Whether this evaluation belongs to a step. Step 0 is the model that the run began with."""
        every = self._run.config.eval_every
        return step > 0 and (step == self._run.steps or bool(every) and step % every == 0)

    def run(self, step: int, trainable: Params, frozen: Params) -> None:
        """Evaluates the parameters of a step and reports the scores."""
        total, count = 0.0, 0
        steps, workers = self._run.data.validation.epoch_steps(0), self._run.config.data.workers
        with self._goodput.measure("evaluation"):
            for batch, _, bad in self._batches.iterate(0, steps, workers):
                self._reporter.bad.note(step, bad, "validation")
                batch_total, batch_count = self._loss_sum(trainable, frozen, self._run.put(batch))
                total, count = total + float(batch_total), count + int(batch_count)
            self._reporter.share_bad(f"validation {step}")
            loss = total / max(count, 1)  # all samples may be skipped
            self._reporter.write_scores(step, {"validation_loss": loss}, f"validation loss {loss:.4f}")


class BenchmarkScores:
    """The scores of `config.evaluate.benchmark`. Step 0 is scored, too, so that errors in its files show at once."""

    def __init__(self, run: Run, reporter: Reporter, goodput: Goodput):
        self._run, self._reporter, self._goodput = run, reporter, goodput
        self.metrics = f"{run.benchmark.name}/"

    def due(self, step: int) -> bool:
        return step == 0 or self._run.benchmark.due(step, self._run.steps)

    def run(self, step: int, trainable: Params, frozen: Params) -> None:
        dtype = self._run.program.settings.dtype
        with self._goodput.measure("evaluation"):
            scores = self._run.benchmark.run(step, trainable | frozen, dtype, self._run.workdir)
            line = "  ".join(f"{name} {score:g}" for name, score in scores.items())
            self._reporter.write_scores(step, scores, line)
