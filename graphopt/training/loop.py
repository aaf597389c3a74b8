"""The training loop: torch.optim over a graph's module, to the best weights that `evaluate` finds."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.pipeline.batches import Batch, Batches
from graphopt.training import memory, precision, streams
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
    ) -> None:
        """graph: of the fx dialect. objective: what is minimized. module: of the graph, with the objective's values
        besides; made here without it. frozen: names of the module's parameters that stay. rules: by parameter, what
        its weight keeps to. evaluate: a graph -> its metric, more is better. name: in progress bars and messages.

        Raises UsageError where nothing is left to train.
        """
        self.graph, self.objective, self.batches, self.settings = graph, objective, batches, settings
        self.evaluate, self.checkpoints, self.watchers, self.name = evaluate, checkpoints, watchers, name
        self.rules = dict(rules or {})
        self.device = precision.device_of(settings.device)
        self.module = module or trainable(graph, objective, settings)
        for trained in (self.module, objective, *self.rules.values()):
            trained.to(self.device)
        self.inputs = [value.name for value in graph.inputs]
        self.outcome = Outcome()
        self.parameters = {name: one for name, one in self.module.named_parameters() if name not in frozen}
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self.parameters)
        if not self.parameters:
            raise UsageError(f"{self.name}: no parameter is left to train (freeze={settings.freeze})")
        self.optimizer = self._optimizer()
        self.amp = precision.Amp("off", self.device)
        self.step = 0
        self.epoch = 0
        self.seen = 0
        """Batches of this epoch."""
        self.spent = 0.0
        """Seconds of earlier sessions."""
        self.model_stream = streams.Stream(settings.seed)
        self.is_done = False
        """Whether an earlier session has ended the training."""
        self.evaluated_at = 0
        """The step of the last evaluation."""
        self._interrupted = False

    # --- the whole ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train, and write the best weights into the graph. The user's random states stay as they were."""
        with streams.restored(), self._interruptible():
            self._begin = time.monotonic()
            self.total = self._total_steps()
            if self.checkpoints is None or not self.checkpoints.resume(self):
                self.amp = precision.chosen(self.settings.amp, self.device, self._trial, self.outcome.notes)
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
        self.graph.absorb(self.module)
        self.outcome.steps = self.step
        self.outcome.metric = None if self.evaluate is None else self.best.metric
        return self.outcome

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
                if self.checkpoints is not None:
                    self.checkpoints.due(self)
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
        self.module.train()
        for module in self.module.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and own and not any(one.requires_grad for one in own):
                module.eval()

    # --- steps -------------------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[list[Batch]]:
        """The batches of each step, epoch by epoch, until the limits are reached."""
        while not self._is_over():
            data = streams.Stream(self.settings.seed + 1 + self.epoch)
            several: list[Batch] = []
            with data.active():
                batches = self.batches.with_batches()
            self._skip(batches, data)
            while (batch := self._next(batches, data)) is not None:
                several.append(batch)
                if len(several) == self.settings.accumulate:
                    yield self._taken(several)
                    several = []
            if self._interrupted:
                return
            if several:
                yield self._taken(several)
            if self.evaluate is not None and self.settings.evaluate_every is None and not self._is_over():
                self._evaluated()
            self.epoch, self.seen = self.epoch + 1, 0
            if self.checkpoints is not None:
                self.checkpoints.new_epoch()

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
            if self._interrupted:
                return None
            raise

    def _step(self, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """One step of the optimizer on the mean gradient of some batches; the loss, and its terms."""
        done = self._progress()
        for rule in self.rules.values():
            rule.progress(done)
        self._set_lr(self._progress(self.step + 0.5))
        self.optimizer.zero_grad(set_to_none=True)
        total, sums = 0.0, dict[str, float]()
        with self.model_stream.active(), memory.explained(self.name, self.settings, batches):
            for batch in batches:
                terms = self.losses(batch)
                loss = torch.stack([term.float() for term in terms.values()]).sum()
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise Diverged(f"the loss is {value} at step {self.step + 1}, {self._at_rate()}")
                if not loss.requires_grad:
                    raise UsageError(f"{self.name}: {self._without_gradient()}")
                torch.autograd.backward(self.amp.scaler.scale(loss / len(batches)))
                total += value / len(batches)
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(term.detach()) / len(batches)
            if self.step == 0:
                self._note_unused()
            if self.evaluate is None and self._is_settled:
                self._keep()
            self._update()
        self.step += 1
        return total, sums if len(sums) > 1 else {}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss on one batch, in the precision of the training."""
        feeds = [batch.feeds[name].to(self.device) for name in self.inputs]
        with self.amp.autocast():
            result = functional_call(self.module, self._effective(), tuple(feeds))
            outputs, also = result if self.objective.also else (result, [])
            found: dict[str, Tensor] = self.objective(outputs, also, batch)
            return found

    def _update(self) -> None:
        trained = [one for group in self.optimizer.param_groups for one in group["params"] if one.grad is not None]
        self.amp.scaler.unscale_(self.optimizer)
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(trained, self.settings.clip)
        self.amp.scaler.step(self.optimizer)
        self.amp.scaler.update()
        with torch.no_grad():
            for name, rule in self.rules.items():
                rule.after_step(self.parameters[name])

    def _effective(self) -> dict[str, Tensor]:
        return {name: rule.effective(self.parameters[name]) for name, rule in self.rules.items()}

    # --- the optimizer -----------------------------------------------------------------------------------------------

    def _optimizer(self) -> torch.optim.Optimizer:
        """Matrices and kernels decay; vectors (biases, norms, scales) and what the objective and the rules learn do
        not."""
        own = dict.fromkeys(one for rule in self.rules.values() for one in rule.parameters())  # rules may share some
        decays = {name: one.dim() >= 2 and not name.endswith(".scale") for name, one in self.parameters.items()}
        weights = [one for name, one in self.parameters.items() if decays[name]]
        others = [one for name, one in self.parameters.items() if not decays[name]]
        groups = [
            {"params": weights, "weight_decay": self.settings.weight_decay},
            {"params": [*others, *self.objective.parameters(), *own], "weight_decay": 0.0},
        ]
        if self.settings.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.settings.lr, fused=True)
        return torch.optim.SGD(groups, lr=self.settings.lr, momentum=0.9)

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
            self._counted = sum(1 for _ in self.batches.with_batches()) if count is None else count
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
        """Spent so far, earlier sessions included."""
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
                self.best = Best(self._state(), math.nan, self.step)
            return
        metric = self._score()
        self._tell({"step": self.step, "metric": metric})
        if not self._is_settled:
            return
        if metric > self.best.metric or not self.best.settled:
            self.best = Best(self._state(), metric, self.step)
        else:
            self.best.waited += 1

    def _score(self) -> float:
        """The metric of the graph with the weights as they are now: what would ship."""
        assert self.evaluate is not None
        trial = self.graph.clone()
        with self._as_read():
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

    def _now(self) -> Iterator[tuple[str, Tensor]]:
        """What the best weights are a copy of: the tensors of the module and of the rules."""
        yield from self.module.state_dict().items()
        for parameter, rule in self.rules.items():
            yield from ((f"rule/{parameter}/{name}", one) for name, one in rule.state_dict().items())

    def _state(self) -> dict[str, Tensor]:
        with self._as_read():
            return {name: one.detach().clone() for name, one in self._now()}

    def _keep(self) -> None:
        """The weights as they are now are the best so far: their loss is finite."""
        with self._as_read():
            for name, one in self._now():
                self.best.state[name].copy_(one)
        self.best.step, self.best.settled = self.step, True

    def _require_finite(self) -> None:
        """Raise Diverged where a weight that was finite is not any more."""
        for name, one in self.module.state_dict().items():
            if not bool(one.isfinite().all()) and bool(self.best.state[name].isfinite().all()):
                raise Diverged(f"{name} is not finite after step {self.step}, {self._at_rate()}")

    def _load(self, state: Mapping[str, Tensor]) -> None:
        left = dict(state)
        for parameter, rule in self.rules.items():
            rule.load_state_dict({name: left.pop(f"rule/{parameter}/{name}") for name in rule.state_dict()})
        self.module.load_state_dict(left)

    @contextmanager
    def _as_read(self) -> Iterator[None]:
        """The module with the weights that its forward pass reads, where rules make them differ."""
        with torch.no_grad():
            stored = {name: self.parameters[name].clone() for name in self.rules}
            for name, weight in self._effective().items():
                self.parameters[name].copy_(weight)
            try:
                yield
            finally:
                for name, weight in stored.items():
                    self.parameters[name].copy_(weight)

    # --- what is told ------------------------------------------------------------------------------------------------

    def _tell(self, line: Line) -> None:
        self.outcome.lines.append(line)
        for one in self.watchers:
            one.trained(line)

    def _progress_text(self, line: Line) -> str:
        metric = "" if math.isnan(self.best.metric) else f", best metric {self.best.metric:.4g}"
        return f"loss {line['loss']:.4g}, lr {line['lr']:.2g}{metric}"

    def _note_unused(self) -> None:
        unused = [name for name, one in self.parameters.items() if one.grad is None]
        if unused:
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
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            self.outcome.notes.append(f"interrupted at step {self.step}: the best weights so far are kept")

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # --- the first steps ---------------------------------------------------------------------------------------------

    @contextmanager
    def _trial(self) -> Iterator[Callable[[precision.Amp], Callable[[], None]]]:
        """Makes functions that run a forward and a backward pass in some precision; nothing that they change stays."""
        before = {name: one.detach().clone() for name, one in self._now()}
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
                        loss = torch.stack([term.float() for term in self.losses(batch).values()]).sum()
                        if loss.requires_grad:
                            torch.autograd.backward(loss)
                    self.optimizer.zero_grad(set_to_none=True)

                return call

            self._train_mode()
            yield timed
        self._load(before)


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
