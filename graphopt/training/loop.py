"""The training loop: torch.optim over a graph's module, to the best weights that `evaluate` finds."""

from __future__ import annotations

import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.pipeline.batches import Batch, Batches
from graphopt.pipeline.loss import wide
from graphopt.training import memory, precision, streams
from graphopt.training.meshes import Mesh, spread
from graphopt.training.objective import Objective
from graphopt.training.outcome import Best, Line, Outcome
from graphopt.training.rules import WeightRule
from graphopt.training.schedule import learning_rate
from graphopt.training.settings import EPOCHS, Settings

if TYPE_CHECKING:
    from graphopt.pipeline.instruments import Instrument
    from graphopt.training.checkpoints import Checkpoints


class Diverged(Exception):
    """The loss, or a weight, is NaN or infinite."""


class Trainer:
    """One training of one graph. `run` leaves the best weights in the graph."""

    def __init__(
        self,
        graph: Graph,
        objective: Objective,
        batches: Batches,
        settings: Settings,
        *,
        frozen: Sequence[str] = (),
        rules: Mapping[str, WeightRule] | None = None,
        module: nn.Module | None = None,
        evaluate: Callable[[Graph], float] | None = None,
        checkpoints: Checkpoints | None = None,
        watchers: Sequence[Instrument] = (),
        name: str = "training",
        mesh: Mesh | None = None,
    ) -> None:
        """graph: of the fx dialect. objective: what is minimized. module: of the graph, with the objective's values
        besides; made here without it. frozen: names of the module's parameters that stay. rules: by parameter, what
        its weight keeps to. evaluate: a graph -> its metric, more is better. name: in progress bars and messages.
        mesh: the processes that train together, each on its part of the batches.

        Raises UsageError where nothing is left to train, and where the mesh cannot spread it.
        """
        self.graph, self.objective, self.settings, self.mesh = graph, objective, settings, mesh
        self._all_batches = batches
        self.batches = batches if mesh is None else batches.part(mesh.data_index, mesh.data_count)
        self.evaluate, self.checkpoints, self.watchers, self.name = evaluate, checkpoints, watchers, name
        self.rules = dict(rules or {})
        self.device = precision.device_of(settings.device)
        self.module = module or trainable(graph, objective, settings)
        for one in (self.module, objective, *self.rules.values()):
            one.to(self.device)
        self.inputs = [value.name for value in graph.inputs]
        self.outcome = Outcome()
        trained = [known for known, _ in self.module.named_parameters() if known not in frozen]
        for known, parameter in self.module.named_parameters():
            parameter.requires_grad_(known in trained)
        if not trained:
            raise UsageError(f"{self.name}: no parameter is left to train (freeze={settings.freeze})")
        self.spread = spread(mesh, graph, self.module, objective, trained, self.rules, settings)
        self.rules = self.spread.rules(self.rules)
        self.parameters = self.spread.parameters
        self.optimizer = self._optimizer()
        self.spread.prepare(self.optimizer, self._others, settings)
        self.parameters = self.spread.parameters
        self.amp = precision.Amp("off", self.device)
        self.step = 0
        self.epoch = 0
        self.seen = 0
        """Batches of this epoch."""
        self.spent = 0.0
        """Seconds of earlier sessions."""
        self.model_stream = streams.Stream(settings.seed + (0 if mesh is None else 2**20 * mesh.data_index))
        self.is_done = False
        """Whether an earlier session has ended the training."""
        self.evaluated_at = 0
        """The step of the last evaluation."""
        self._interrupted = False
        self._signalled = False
        """Whether this process has had a Ctrl-C, of which others may not know yet."""
        self._told_seconds = 0.0
        self._is_write_due = False

    # --- the whole ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train, and write the best weights into the graph. The user's random states stay as they were."""
        with streams.restored(), self._interruptible():
            self._begin = time.monotonic()
            self.total = self._total_steps()
            if self.checkpoints is None or not self.checkpoints.resume(self):
                self.amp = self._chosen_precision()
                self.best = Best(self._state(), self._score() if self.evaluate else math.nan, 0, self._is_settled)
                if self.evaluate is not None:
                    self._tell({"step": 0, "metric": self.best.metric})
            try:
                if not self.is_done:
                    self._train()
            except Diverged as error:
                self._diverged(error)
                if self.checkpoints is not None:
                    self.checkpoints.write(self, is_done=True)
        self._load(self.best.state)
        self._release()
        self.spread.settle(self.module)
        self.graph.absorb(self.module)
        self.outcome.steps = self.step
        self.outcome.metric = None if self.evaluate is None else self.best.metric
        return self.outcome

    def _release(self) -> None:
        """Free what only further steps would need, before the whole weights are made."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        self.best.state = {}

    def _train(self) -> None:
        self._train_mode()
        with ExitStack() as stack:
            bars = [stack.enter_context(one.watch(self.name, self.total)) for one in self.watchers]
            for batches in self._steps():
                loss, terms = self._step(batches)
                line: Line = {"step": self.step, "loss": loss, **terms, "lr": self._lr()}
                self._tell(line)
                for advance in bars:
                    advance(self._progress_text(line))
                if self._is_due():
                    self._evaluated()
                if self.checkpoints is not None and self._is_write_due:
                    self.checkpoints.write(self)
                if self._is_over():
                    break
            if self.checkpoints is not None and self._interrupted:
                self.checkpoints.write(self)  # before an evaluation that an unbroken run would not have had
            is_early = not self._is_settled
            if is_early:
                self.outcome.notes.append(f"training ended early, at step {self.step}: what was left to remove went at "
                                          "once")  # fmt: skip
                for rule in self.rules.values():
                    rule.progress(1.0)
            if is_early or self.evaluated_at != self.step:
                self._evaluated()
            if self.checkpoints is not None and not self._interrupted:
                self.checkpoints.write(self, is_done=True)

    def _train_mode(self) -> None:
        """Dropout is active, and batch norms have the statistics of the batch, but for those that are frozen."""
        self.spread.module.train()
        for module in self.spread.module.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and own and not any(one.requires_grad for one in own):
                module.eval()

    # --- steps -------------------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[list[Batch]]:
        """The batches of each step, epoch by epoch, until the limits are reached."""
        while not self._is_over():
            data = streams.Stream(self.settings.seed + 1 + self.epoch)
            self.batches.begin(self.epoch)
            with data.active():
                batches = self.batches.with_batches()
            self._skip(batches, data)
            while self._agree(several := self._several(batches, data)):
                yield self._taken(several)
            if self._interrupted:
                return
            if self.evaluate is not None and self.settings.evaluate_every is None and not self._is_over():
                self._evaluated()
            self.epoch, self.seen = self.epoch + 1, 0
            if self.checkpoints is not None:
                self.checkpoints.new_epoch()

    def _several(self, batches: Iterator[Batch], data: streams.Stream) -> list[Batch]:
        """The batches of the next step; fewer at the end of an epoch, and none after it, or where a session ends."""
        several: list[Batch] = []
        while len(several) < self.settings.accumulate:
            if (batch := self._next(batches, data)) is None:
                return [] if self._signalled else several
            several.append(batch)
        return several

    def _agree(self, several: Sequence[Batch]) -> bool:
        """Tell the other ranks what this one has for the next step; whether there is one. A rank whose data has ended
        goes on with the others, and counts for nothing."""
        is_due = self.checkpoints is not None and self.checkpoints.is_due
        told = self.spread.agreed(
            len(several), interrupted=self._signalled, seconds=self._own_seconds(), is_due=is_due
        )
        self._told, self._told_seconds, self._is_write_due = told, told.seconds, told.is_due
        self._interrupted = self._interrupted or (told.interrupted and self.mesh is not None)
        return told.batches > 0 and not (self._interrupted and self.mesh is not None)

    def _skip(self, batches: Iterator[Batch], data: streams.Stream) -> None:
        """Read the batches of this epoch again that an earlier session has trained on."""
        if not self.seen or self.checkpoints is None:
            return
        again = (self._next(batches, data) for _ in range(self.seen))
        self.checkpoints.saw(batch for batch in again if batch is not None)
        self.checkpoints.skipped(self.outcome.notes)

    def _taken(self, batches: list[Batch]) -> list[Batch]:
        """Batches that the next step trains on, counted: what is only read when a session ends is read again."""
        self.seen += len(batches)
        if self.checkpoints is not None:
            self.checkpoints.saw(batches)
        return batches

    def _next(self, batches: Iterator[Batch], data: streams.Stream) -> Batch | None:
        """The next batch of an epoch; None after the last, or where Ctrl-C has ended the processes that read them."""
        try:
            with data.active():
                return next(batches, None)
        except UsageError:
            if self._signalled:
                return None
            raise

    def _step(self, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """One step of the optimizer on the mean gradient of some batches; the loss, and its terms."""
        done = self._progress()
        for rule in self.rules.values():
            rule.progress(done)
        self._set_lr(self._progress(self.step + 0.5))
        self.optimizer.zero_grad(set_to_none=True)
        with self.model_stream.active(), memory.explained(self.name, self.settings, batches):
            own = self.spread.gradients(self, batches)
            self.spread.reduce(self._others)
            terms = self.spread.terms(own)
            total = sum(terms.values())
            if not math.isfinite(total):
                raise Diverged(f"the loss is {total} at step {self.step + 1}, {self._at_rate()}")
            if self.step == 0:
                self._note_unused()
            if self.evaluate is None and self._is_settled:
                self._keep()
            self._update()
        self.step += 1
        return total, terms if len(terms) > 1 else {}

    def backward(self, batch: Batch, weight: float) -> dict[str, float]:
        """Add the gradient of the loss on one batch, times a weight; the terms of the loss, times the weight."""
        with self.amp.autocast():
            result = self.spread.run(self.effective(), self.feeds(batch))
        loss, terms = self.judged(result, batch, weight)
        torch.autograd.backward(loss)
        return terms

    def feeds(self, batch: Batch) -> list[Tensor]:
        """The inputs of the graph in order, on the device."""
        return [batch.feeds[name].to(self.device) for name in self.inputs]

    def judged(self, result: Any, batch: Batch, weight: float) -> tuple[Tensor, dict[str, float]]:
        """The loss of what the module returned for a batch, times a weight, to differentiate; and its terms."""
        terms = self._terms(result, batch)
        loss = total_of(terms)
        if not loss.requires_grad:
            raise UsageError(f"{self.name}: {self._without_gradient()}")
        return self.amp.scaler.scale(loss * weight), {name: float(one.detach()) * weight for name, one in terms.items()}

    def _terms(self, result: Any, batch: Batch) -> dict[str, Tensor]:
        with self.amp.autocast():
            outputs, also = result if self.objective.also else (result, [])
            found: dict[str, Tensor] = self.objective(outputs, also, batch)
            return found

    def share(self) -> float:
        """What one batch counts in the step that is next: 1 / all of its batches."""
        return 1 / self._told.batches

    def rounds(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, float]]:
        """The batches of a step with what each counts: as many on every rank, so that a rank that has fewer runs one
        again, which counts for nothing."""
        for batch in batches:
            yield batch, self.share()
        for _ in range(self._told.rounds - len(batches)):
            yield batches[-1] if batches else self._spare, 0.0

    @cached_property
    def _spare(self) -> Batch:
        """A batch for a rank that has none of its own."""
        with streams.restored():
            return next(self._all_batches.with_batches())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss on one batch, in the precision of the training."""
        with self.amp.autocast():
            result = self.spread.run(self.effective(), self.feeds(batch))
        return self._terms(result, batch)

    def _update(self) -> None:
        self.spread.update(self.optimizer, self.amp, self.settings.clip, self._others)
        with torch.no_grad():
            for name, rule in self.rules.items():
                rule.after_step(self.parameters[name])

    def effective(self) -> dict[str, Tensor]:
        return {name: rule.effective(self.parameters[name]) for name, rule in self.rules.items()}

    # --- the optimizer -----------------------------------------------------------------------------------------------

    def _optimizer(self) -> torch.optim.Optimizer:
        """Matrices and kernels decay; vectors (biases, norms, scales) and what the objective and the rules learn do
        not."""
        decays = {name: one.dim() >= 2 and not name.endswith(".scale") for name, one in self.parameters.items()}
        weights = [one for name, one in self.parameters.items() if decays[name]]
        others = [one for name, one in self.parameters.items() if not decays[name]]
        groups = [
            {"params": weights, "weight_decay": self.settings.weight_decay},
            {"params": [*others, *self._others], "weight_decay": 0.0},
        ]
        if self.settings.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.settings.lr, fused=True)
        return torch.optim.SGD(groups, lr=self.settings.lr, momentum=0.9)

    @property
    def _others(self) -> list[nn.Parameter]:
        """What is trained besides the module: by the objective, and by rules, which may share some."""
        own = dict.fromkeys(one for rule in self.rules.values() for one in rule.parameters())
        return [*self.objective.parameters(), *own]

    def named(self) -> dict[str, nn.Parameter]:
        """All that the optimizer changes, by the names that checkpoints have for it."""
        found = {f"module/{name}": one for name, one in self.parameters.items()}
        found |= {f"objective/{name}": one for name, one in self.objective.named_parameters()}
        for parameter, rule in self.rules.items():
            found |= {f"rule/{parameter}/{name}": one for name, one in rule.named_parameters()}
        return found

    def _set_lr(self, done: float) -> None:
        factor = learning_rate(done, warmup=self.settings.warmup, decay=self.settings.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    # --- limits ------------------------------------------------------------------------------------------------------

    def _total_steps(self) -> int | None:
        """Steps until `epochs` or `steps` ends the training; None where only minutes do."""
        limits = [] if self.settings.steps is None else [self.settings.steps]
        if self._epochs is not None:
            limits.append(self._epochs * self._epoch_steps)
        return min(limits, default=None)

    @property
    def _epochs(self) -> int | None:
        settings = self.settings
        if settings.epochs is None and settings.steps is None and settings.minutes is None:
            return EPOCHS
        return settings.epochs

    @property
    def _epoch_steps(self) -> int:
        """Steps of one epoch; a source of unknown length is counted by reading it."""
        if self._counted is None:
            count = self.batches.count
            if count is None and self.batches.once:
                raise UsageError(
                    f"{self.name}: training data that is a generator can be read once, and how long it is decides the "
                    "learning rate; pass a list or a DataLoader, or steps="
                )
            self._counted = self.spread.most(
                sum(1 for _ in self.batches.with_batches()) if count is None else count
            )
            if not self._counted:
                raise UsageError(f"{self.name}: the training data holds no batch")
        return math.ceil(self._counted / self.settings.accumulate)

    _counted: int | None = None

    def _progress(self, step: float | None = None) -> float:
        """The share of the training that is done, by steps or by time, whichever is further.

        step: instead of the one that the training is at. Learning rates are those of the middle of a step, so that
        they are 0 neither in the first nor in the last.
        """
        by_steps = 0.0 if self.total is None else (self.step if step is None else step) / self.total
        by_time = 0.0 if self.settings.minutes is None else self.seconds() / (60 * self.settings.minutes)
        return min(max(by_steps, by_time), 1.0)

    def seconds(self) -> float:
        """Spent so far, earlier sessions included; of several ranks, what rank 0 told before the step."""
        return self._own_seconds() if self.mesh is None else self._told_seconds

    def _own_seconds(self) -> float:
        return self.spent + time.monotonic() - self._begin

    def _is_over(self) -> bool:
        patience = self.settings.patience
        if patience is not None and self.best.waited >= patience:
            return True
        is_read = self._epochs is not None and self.epoch >= self._epochs  # a source may hold less than its len
        return self._interrupted or is_read or self._progress() >= 1

    def _is_due(self) -> bool:
        """Whether to evaluate now, in the middle of an epoch."""
        every = self.settings.evaluate_every
        return self.evaluate is not None and every is not None and self.step % every == 0

    # --- the best weights --------------------------------------------------------------------------------------------

    def _evaluated(self) -> None:
        self._require_finite()
        self.evaluated_at = self.step
        if self.evaluate is None:
            if self._is_settled:
                self._keep()
            return
        metric = self._score()
        self._tell({"step": self.step, "metric": metric})
        if not self._is_settled:
            return
        if metric > self.best.metric or not self.best.settled:
            self._keep()
            self.best.metric, self.best.waited = metric, 0
        else:
            self.best.waited += 1

    def _score(self) -> float:
        """The metric of the graph with the weights as they are now: what would ship."""
        assert self.evaluate is not None
        trial = self.graph.clone()
        with self._as_read(), self.spread.filled(self.module):
            trial.absorb(self.module)
        with streams.restored():
            given = self.evaluate(trial)
        try:
            metric = float(given)
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(f"{self.name}: evaluate gives {given!r}; give one number, more is better") from None
        if math.isnan(metric):
            raise UsageError(f"{self.name}: evaluate gives NaN at step {self.step}; give a number, more is better")
        return metric

    @property
    def _is_settled(self) -> bool:
        return all(rule.is_settled for rule in self.rules.values())

    def now(self) -> Iterator[tuple[str, Tensor]]:
        """What the best weights are a copy of: the tensors of the module and of the rules."""
        yield from self.spread.tensors.items()
        for parameter, rule in self.rules.items():
            yield from ((f"rule/{parameter}/{name}", one) for name, one in rule.state_dict().items())

    def _state(self) -> dict[str, Tensor]:
        with self._as_read():
            return {name: one.detach().clone() for name, one in self.now()}

    def _keep(self) -> None:
        """The weights as they are now are the best so far; written over those before, as a second copy takes memory."""
        with self._as_read():
            for name, one in self.now():
                self.best.state[name].copy_(one)
        self.best.step, self.best.settled = self.step, True

    def _require_finite(self) -> None:
        """Raise Diverged where a weight that was finite is not any more, on any rank."""
        lost = [
            name for name, one in self.spread.tensors.items()
            if not bool(one.isfinite().all()) and bool(self.best.state[name].isfinite().all())
        ]  # fmt: skip
        if lost := self.spread.gathered(lost):
            raise Diverged(f"{lost[0]} is not finite after step {self.step}, {self._at_rate()}")

    def _load(self, state: Mapping[str, Tensor]) -> None:
        left = dict(state)
        for parameter, rule in self.rules.items():
            rule.load_state_dict({name: left.pop(f"rule/{parameter}/{name}") for name in rule.state_dict()})
        with torch.no_grad():
            for name, one in self.spread.tensors.items():
                one.copy_(left.pop(name))

    @contextmanager
    def _as_read(self) -> Iterator[None]:
        """The module with the weights that its forward pass reads, where rules make them differ."""
        with torch.no_grad():
            stored = {name: self.parameters[name].clone() for name in self.rules}
            for name, weight in self.effective().items():
                self.parameters[name].copy_(weight)
            try:
                yield
            finally:
                for name, weight in stored.items():
                    self.parameters[name].copy_(weight)

    @property
    def parts(self) -> int:
        """Into how many parts the batches are split."""
        return 1 if self.mesh is None else self.mesh.data_count

    # --- what is told ------------------------------------------------------------------------------------------------

    def _tell(self, line: Line) -> None:
        self.outcome.lines.append(line)
        for one in self.watchers:
            one.trained(line)

    def _progress_text(self, line: Line) -> str:
        metric = "" if math.isnan(self.best.metric) else f", best metric {self.best.metric:.4g}"
        return f"loss {line['loss']:.4g}, lr {line['lr']:.2g}{metric}"

    def _note_unused(self) -> None:
        if unused := self.spread.unused():
            self.outcome.notes.append(
                f"the loss does not depend on {', '.join(unused[:5])}{' and more' * (len(unused) > 5)}, left as it was"
            )

    def _without_gradient(self) -> str:
        """Why the loss has no gradient: the node through which none passes."""
        stops = [node for node in self.graph.nodes if node.op is None and any(
            result.dtype is not None and not result.dtype.is_floating_point for result in node.results)]  # fmt: skip
        named = f" (the first node without one is {stops[0].label}, {stops[0].kind})" if stops else ""
        return f"the loss has no gradient with respect to any parameter{named}"

    def _at_rate(self) -> str:
        return f"with a learning rate of {self._lr():.3g}"

    def _diverged(self, error: Diverged) -> None:
        wide = ", or amp=bfloat16" if self.amp.name == "float16" else ""
        if self.step == 0:
            raise UsageError(
                f"{self.name}: {error}, before anything was trained: look at the labels and at loss={wide}"
            ) from error
        if not self.best.settled or (self.best.step == 0 and self.evaluate is None):
            raise UsageError(
                f"{self.name}: {error}, before any weights were kept; give a lower lr, a lower clip{wide}"
            ) from error
        self.outcome.notes.append(f"{error}: training stopped, and the weights of step {self.best.step} are kept")

    # --- Ctrl-C ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the training after the current step; the second aborts."""
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(before):  # it is ignored already
            yield
            return

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self._signalled:
                raise KeyboardInterrupt
            self._signalled, self._interrupted = True, self.mesh is None
            self.outcome.notes.append(f"interrupted at step {self.step}: the best weights so far are kept")

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # --- the first steps ---------------------------------------------------------------------------------------------

    def _chosen_precision(self) -> precision.Amp:
        """The precision of all ranks; where it is timed, by the first of them."""
        choose = functools.partial(
            precision.chosen, self.settings.amp, self.device, self._trial, self.outcome.notes
        )
        if self.mesh is None or self.settings.amp != "auto":
            return choose()
        return precision.Amp(self.mesh.first(lambda: choose().name), self.device)

    @contextmanager
    def _trial(self) -> Iterator[Callable[[precision.Amp], Callable[[], None]]]:
        """Makes functions that run a forward and a backward pass in some precision; nothing that they change stays."""
        before = {name: one.detach().clone() for name, one in self.now()}
        if self.batches.once:
            raise UsageError(
                f"{self.name}: amp=auto times the first batch, and a generator gives it once; pass a list or a "
                "DataLoader, or amp=bfloat16 or off"
            )
        with streams.restored():
            batch = next(iter(self.batches.with_batches()))

            def timed(amp: precision.Amp) -> Callable[[], None]:
                def call() -> None:
                    self.amp = amp
                    with memory.explained(self.name, self.settings, [batch]):
                        loss = total_of(self.losses(batch))
                        if loss.requires_grad:
                            torch.autograd.backward(loss)
                    self.optimizer.zero_grad(set_to_none=True)

                return call

            self._train_mode()
            yield timed
        self._load(before)


def total_of(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of the terms of a loss, in at least float32."""
    return functools.reduce(torch.add, map(wide, terms.values()))


def trainable(graph: Graph, objective: Objective, settings: Settings) -> nn.Module:
    """The module of a graph that a `Trainer` trains: it returns the outputs, and what the objective reads besides."""
    return graph.module(tuple, also=objective.also, learn_scales=settings.learn_scales)


def require_batches(batches: Batches, graph: Graph, name: str) -> None:
    """Raise UsageError where the first batch holds one sample, and a batch norm computes statistics over it.

    Later batches are checked as they come (`memory.explained`).
    """
    norms = graph.sites("batch_norm")
    if not norms or batches.once:
        return
    with streams.restored():
        first = next(batches.with_batches())
    if max((len(feed) for feed in first.feeds.values() if feed.dim()), default=0) == 1:
        raise UsageError(
            f"{name}: training batch 0 holds one sample, and {norms[0].label} is a batch norm, whose statistics need "
            "several; use larger batches, or simplify first, which folds it"
        )
