r"""`capture`: the network inside a pipeline, conditioned and guided as the pipeline does it, as a `Flow`.

A scheduler cannot reject a step, nor ask for a divergence. Solvers that do need the loop:

    from flowsolve.adapters.diffusers import capture
    held = capture(pipe, prompt, guidance_scale=5.0, generator=g)
    sol = fs.sample(held.flow, start=held.start, interval=held.interval, solver=fs.solvers.Dopri5(), cond=held.cond)
    images = held.decode(sol.x).images

**How.** A pipeline is a function of (x, t) only in the body of its own loop: the prompts, the guidance, the residuals
of a ControlNet are its local variables. So it is left there. A shallow copy of the pipeline runs in a thread of its own
with a scheduler whose `step()` does not step: it hands the model's output out, waits until it is asked about another
(x, t), and returns that x as the next sample, while the loop's next time step is that t. An evaluation is one turn of
the pipeline's own loop, whatever that does. To decode, the call is made once more, with a scheduler that returns the
given latents at its first step and ends the loop.

**Limits.**

* The pipeline must iterate over `scheduler.timesteps` (or a slice), call `scheduler.step` once in a turn, and leave the
  sample alone in between. Inpainting by blending does not, nor does `denoising_end`: errors, not wrong answers.
* What depends on the number of the turn (a ControlNet for the first half of the steps) is no function of (x, t), and
  refused where an argument of the call says so (`turns`). Other numbers of turns go on rising: a pipeline that looks
  them up in a table of its own ends at the end of that table, and says so.
* All samples of a turn have one time. Samples at different times, as an adaptive solver has them, take one turn each:
  capture one sample at a time, or expect B times the work for a batch of B. NFE counts what a sample asked for.
* Thread-local settings of the caller, such as autocast, do not reach the loop, except for the device.
* Configured clipping and thresholding of ẑ is the scheduler's, and is not part of the flow; for it, wrap the flow:
  `guidance.Transformed(held.flow, guidance.Clip())`.
* A likelihood under guidance is that of the guided field, which is not a density of the model at any temperature.
"""

from __future__ import annotations

import copy
import queue
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowsolve._batch import state_dtype
from flowsolve.adapters.diffusers.layout import OWN
from flowsolve.adapters.diffusers.refusals import warn_if_distilled
from flowsolve.adapters.diffusers.scheduler import Scheduler, StepOutput
from flowsolve.adapters.diffusers.timetable import level, one_time
from flowsolve.adapters.diffusers.turns import require_no_turns, without_turns
from flowsolve.adapters.networks import first_half
from flowsolve.flow import Flow
from flowsolve.solvers import Auto

__all__ = ["Captured", "capture"]

DENOISERS = ("unet", "transformer", "prior")


@dataclass(frozen=True)
class Captured:
    """A pipeline's network, and what a solve of it needs.

    Attributes:
        flow: the flow; its `nfe_per_call` is the number of network evaluations that one turn of the loop makes.
        start: the latents from which the pipeline would start, float32 at least, shape (B, *S).
        interval: the flow times between which the pipeline would step.
        cond: to be passed as cond=: says which of the pipeline's prompts a sample belongs to.
        pipe, args, kwargs: the call.
    """

    flow: Flow
    start: Tensor
    interval: tuple[float, float]
    cond: Mapping[str, Tensor]
    pipe: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def decode(self, x: Tensor) -> Any:
        """What the pipeline returns for latents at the data end, shape (B, *S); one more evaluation of its network.

        Raises:
            ValueError: latents of another shape than the pipeline's.
        """
        if x.shape != self.start.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected that of the pipeline, {tuple(self.start.shape)}")
        return _led(self.pipe, _Ending(x.detach()))(*self.args, **_copied(self.kwargs))

    def close(self) -> None:
        """End the pipeline's thread; done by itself when the flow is no longer in use."""
        net: Any = self.flow.net
        net.close()


def capture(pipe: Any, *args: Any, **kwargs: Any) -> Captured:
    """The network of a pipeline with the conditioning of a call, as a flow.

    Costs one evaluation of the network. The pipeline itself is not changed. A pipeline that is known to be distilled
    (turbo, schnell, LCM) is a UserWarning: its network has no ODE.

    Args:
        pipe: a diffusers pipeline, with its own scheduler or a `Scheduler`.
        *args: of the call.
        **kwargs: of the call; num_inference_steps matters only for the start of image-to-image.

    Raises:
        ValueError: a scheduler that is not supported, or a call that decides by the number of the turn.
        RuntimeError: a pipeline whose loop cannot be led; see the module's docstring.
    """
    require_no_turns(pipe, args, kwargs)
    kwargs = without_turns(pipe, kwargs)
    warn_if_distilled(pipe)
    loop, later = _Waiting(), _copied(kwargs)  # copied before the call draws from its generators
    led, net = _led(pipe, loop), _Turn(loop)
    sample, when = loop.begin(led, args, kwargs)
    reading, plan, net.batch = led.scheduler.reading, loop.plan, len(sample)
    clock = led.scheduler._table.clock
    flow = Flow(net, reading.path, reading.flow.prediction, time=clock, nfe_per_call=max(1, loop.calls))
    t = min(plan.times, key=lambda v: abs(float(clock(v)) - when))
    end = plan.end if plan.closing is None else plan.closing.t
    start = sample.detach().to(state_dtype(sample))
    return Captured(flow, start, (t, end), {"rows": torch.arange(len(sample), device="cpu")}, pipe, args, later)


class _Loop:
    """What leads a pipeline's loop: gives its time steps, and takes its steps."""

    plan: Any = None
    given: Tensor | None = None
    shown: Tensor | None = None
    stepped = True
    done = False
    turns = 0
    time: Tensor | None = None

    def times(self, known: Tensor) -> Iterator[Tensor]:
        """The time steps, each when the step before it has been taken."""
        self.time = known.as_subclass(Tensor)[0]
        while not self.done:
            if not self.stepped:
                raise RuntimeError(
                    "the pipeline looks ahead in its time steps, or leaves out scheduler.step; such a loop cannot be "
                    "led (drop denoising_end and the like)"
                )
            self.stepped = False
            self.shown = self.time
            yield self.time

    def step(self, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """The next sample."""
        if timestep is not self.shown:
            raise RuntimeError("the pipeline makes time steps of its own from the scheduler's; its loop cannot be led")
        if self.given is not None and sample is not self.given and not torch.equal(sample, self.given):
            raise RuntimeError(
                "the pipeline changes the sample between two steps (as inpainting does), so that its network is no "
                "function of (x, t); use a Scheduler instead"
            )
        self.stepped = True
        self.given = self.exchange(output, sample)
        return self.given

    def exchange(self, output: Tensor, sample: Tensor) -> Tensor:
        """The next sample, from the output of the last."""
        raise NotImplementedError

    def factor(self, k: float) -> float:
        """By what the pipeline is shown a state larger at a network's time."""
        reading = self.plan.reading
        return float(reading.shown(reading.path.at(float(reading.native(k)))))


class _Ending(_Loop):
    """A loop that ends at its first step, with given latents."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def exchange(self, output: Tensor, sample: Tensor) -> Tensor:
        self.done = True
        shown: float = self.plan.shown(None)
        return (self.x * shown).to(sample.device, sample.dtype)


class _Stop(BaseException):
    """Ends a pipeline from within its loop."""


class _Waiting(_Loop):
    """A loop in a thread of its own, that waits to be asked."""

    calls = 0

    def __init__(self) -> None:
        self.requests: queue.Queue[Any] = queue.Queue()
        self.answers: queue.Queue[Any] = queue.Queue()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.counting = True

    def begin(self, pipe: Any, args: Any, kwargs: Any) -> tuple[Tensor, float]:
        """Run a call up to its first step: the sample and the network's time there."""
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> None:
            if device is not None:
                torch.cuda.set_device(device)
            try:
                with ExitStack() as hooks:
                    for name in DENOISERS:
                        module = getattr(pipe, name, None)
                        if isinstance(module, nn.Module):
                            hooks.callback(module.register_forward_pre_hook(self.count, with_kwargs=True).remove)
                    pipe(*args, **kwargs)
                self.answers.put(RuntimeError("the pipeline came to its end without calling scheduler.step again"))
            except _Stop:
                pass
            except IndexError as error:
                steps = len(self.plan.times) if self.plan is not None else 0
                if self.turns < steps:
                    self.answers.put(error)
                    return
                ended = RuntimeError(
                    f"the pipeline looks things up by the number of the turn, and its tables end after {steps} of them "
                    f"({error}); capture it with num_inference_steps as large as the evaluations that a solve may need"
                )
                ended.__cause__ = error
                self.answers.put(ended)
            except BaseException as error:  # told to whoever waits
                self.answers.put(error)

        self.thread = threading.Thread(target=run, name="flowsolve-capture", daemon=True)
        self.thread.start()
        _, sample = self.answered()
        assert self.shown is not None
        self.calls = round(self.calls / len(sample))
        return sample, float(self.shown)

    def count(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Count the rows that the network is evaluated on before the first step, in the loop's own thread."""
        if self.counting and threading.current_thread() is self.thread and self.shown is not None:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 1]
            names = [kwargs[k] for k in ("sample", "hidden_states") if isinstance(kwargs.get(k), Tensor)]
            self.calls += len((names or tensors)[0]) if names or tensors else 0

    def exchange(self, output: Tensor, sample: Tensor) -> Tensor:
        self.counting, self.turns = False, self.turns + 1
        assert self.shown is not None
        shown = self.factor(float(self.shown))
        self.answers.put((output, sample if shown == 1.0 else sample.to(state_dtype(sample)) / shown))
        request = self.requests.get()
        if request is None:
            raise _Stop
        x, t, grad = request
        torch.set_grad_enabled(grad)  # of this thread, until the pipeline's own no_grad ends
        self.time = torch.tensor(t, dtype=torch.float32, device=sample.device)
        return (x * self.factor(t)).to(sample.dtype)  # type: ignore[no-any-return]

    def answered(self) -> Any:
        """What the loop hands out next."""
        found = self.answers.get()
        if isinstance(found, BaseException):
            self.thread = None
            raise found
        return found

    def ask(self, x: Tensor, t: float) -> Tensor:
        """The output at (x, t), by one turn of the loop."""
        with self.lock:
            if self.thread is None:
                raise RuntimeError("the captured pipeline has ended; capture it again")
            self.requests.put((x, t, torch.is_grad_enabled()))
            try:
                output, _ = self.answered()
            except BaseException:
                self.end()
                raise
            return output  # type: ignore[no-any-return]

    def end(self) -> None:
        """End the thread."""
        thread, self.thread = self.thread, None
        if thread is not None:
            self.requests.put(None)


class _Turn:
    """A network net(x, t, rows) that is a turn of a pipeline's loop."""

    batch = 1

    def __init__(self, loop: _Waiting) -> None:
        self.loop = loop
        self.close = weakref.finalize(self, loop.end)

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        """The outputs for samples x of shape (b, *S) at times t of shape (b,), which have the prompts `rows`."""
        times = t.tolist()
        if rows is None:
            if len(x) != self.batch and self.batch != 1:
                raise ValueError(
                    f"{len(x)} samples for a pipeline that was called for {self.batch}; pass cond=captured.cond, which "
                    "says whose prompt is whose"
                )
            rows = (
                torch.arange(len(x), device="cpu")
                if self.batch > 1
                else torch.zeros(len(x), dtype=torch.int64, device="cpu")
            )
        slots = rows.tolist()
        if len(set(times)) == 1 and slots == list(range(self.batch)):
            return self._ask(x, times[0])
        turns: dict[tuple[float, int], list[int]] = {}
        for i, (when, slot) in enumerate(zip(times, slots, strict=True)):
            layer = 0
            while any(slots[j] == slot for j in turns.get((when, layer), ())):
                layer += 1
            turns.setdefault((when, layer), []).append(i)
        total = torch.zeros_like(x)
        for (when, _), members in turns.items():
            mine = torch.tensor(members, device=x.device)
            place = rows[torch.tensor(members, device="cpu")].to(x.device)
            whole = x[:1].detach().expand(self.batch, *x.shape[1:]).index_copy(0, place, x.index_select(0, mine))
            total = total.index_copy(0, mine, self._ask(whole, when).to(x.dtype).index_select(0, place))
        return total

    def _ask(self, x: Tensor, t: float) -> Tensor:
        return first_half(self.loop.ask(x, t), x)


class _Moving(Tensor):
    """Time steps whose iteration is led; otherwise a tensor like any other."""

    loop: _Loop
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, values: Tensor, loop: _Loop) -> _Moving:
        """Values that a loop leads."""
        made = values.as_subclass(cls)
        made.loop = loop
        return made

    def __iter__(self) -> Iterator[Tensor]:
        return self.loop.times(self)

    def __getitem__(self, key: Any) -> Tensor:
        found = super().__getitem__(key)
        return _Moving.of(found, self.loop) if isinstance(key, slice) else found


class _Levels(Tensor):
    """Noise levels: that with the number of the turn is the level at the time which the turn is asked at."""

    lead: _Lead
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, values: Tensor, lead: _Lead) -> _Levels:
        """Values of a scheduler whose loop is led."""
        made = values.as_subclass(cls)
        made.lead = lead
        return made

    def __getitem__(self, key: Any) -> Tensor:
        lead, loop = self.lead, self.lead.loop
        if key != loop.turns or loop.shown is None:
            raise RuntimeError(
                "the pipeline looks up other noise levels than that of its turn, which are not known while it is led; "
                "use a Scheduler instead"
            )
        return torch.tensor(level(lead.reading, lead._time(loop.shown)), dtype=torch.float32, device="cpu")


class _Lead(Scheduler):
    """A scheduler whose time steps and steps are a loop's."""

    loop: _Loop

    @property
    def timesteps(self) -> Tensor:
        return _Moving.of(super().timesteps, self.loop)

    @property
    def sigmas(self) -> Tensor:
        known = super().sigmas
        return known if self.loop.shown is None else _Levels.of(known, self)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: Any = None,
        return_dict: bool = True,
        *,
        prev_timestep: Any = None,
        per_token_timesteps: Tensor | None = None,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Hand the output over, and return the sample that is asked about next."""
        self.loop.plan = self._table.plan
        model_output = one_time(model_output, per_token_timesteps)
        x = self.loop.step(model_output, timestep, sample)
        return StepOutput(x, x) if return_dict else (x, x)


def _led(pipe: Any, loop: _Loop) -> Any:
    """A shallow copy of a pipeline, silent and led by a loop."""
    lead, own = _Lead(pipe.scheduler, solver="ddim"), pipe.scheduler
    ours = isinstance(own, Scheduler) and not isinstance(own.solver, Auto)
    lead._like, lead._by_name = (own.solver, own._by_name) if ours else (OWN, False)
    lead.loop = loop
    led = copy.copy(pipe)
    led.scheduler = lead
    led._progress_bar_config = {"disable": True}
    return led


def _copied(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments whose generators are copies, so that a second call draws what the first did and moves none of them."""
    return {k: _generators(v) for k, v in kwargs.items()}


def _generators(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], torch.Generator):
        return [_generators(v) for v in value]
    if not isinstance(value, torch.Generator):
        return value
    made = torch.Generator(device=value.device)
    made.set_state(value.get_state())
    return made
