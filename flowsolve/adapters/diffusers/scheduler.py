r"""`Scheduler`: any solver on a fixed budget as a drop-in scheduler for a diffusers pipeline.

    from flowsolve.adapters.diffusers import Scheduler
    pipe.scheduler = Scheduler.from_config(pipe.scheduler.config, solver="unipc")
    pipe(prompt, num_inference_steps=10)

It runs the step generators of `fs.sample`: `step()` sends the network's output into the generator and returns the
sample that the next query is about (`flowsolve.adapters.diffusers.pull`). What the pipeline's own scheduler says about
training is kept (`reading`), and so, unless `grid` says otherwise, are the noise levels that it would visit (`nodes`).

* **Time steps** are float32, neither truncated nor in the pipeline's dtype; the state between steps is in float32 at
  least.
* **Shift** is applied once: to the configuration's own grid, to named grids, and to explicit `sigmas`, which pipelines
  give before the shift. Explicit `timesteps` are taken as they are. Flow pipelines that pass N even `sigmas` from 1 to
  1/N mean "N steps"; where a grid or "auto" was asked for, it has precedence over these.
* **Samples** are shown in the units of the scheduler that the configuration is of: those of Euler's kin are z + σ ε.
* **Noise** is flowsolve's own, a function of a seed, the sample and the interval (`flowsolve.noise`). Seeds are drawn
  from the generator that a pipeline hands to `step`, one for each of a list of generators. A pipeline that hands none
  (SD3, Flux) gets `seed` if one is set, and otherwise noise named by the starting latents themselves: the same latents,
  the same noise.
* **Threads**: a plan is never changed once made, and each thread has its own plan and its own run, so one scheduler, or
  pipelines that share one, can sample in several threads at once. A thread that has set no time steps sees the last
  plan that any thread made.
"""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowsolve._batch import hosted, linear
from flowsolve._optional import require
from flowsolve.adapters.diffusers.convention import completed
from flowsolve.adapters.diffusers.layout import Plan, lay
from flowsolve.adapters.diffusers.peers import as_configured, unstated
from flowsolve.adapters.diffusers.pull import Run
from flowsolve.adapters.diffusers.reading import OURS, Reading, read, start_std
from flowsolve.adapters.diffusers.refusals import advised, warn_if_distilled
from flowsolve.adapters.diffusers.seeds import seeds
from flowsolve.adapters.diffusers.settings import INSTALL, OPTIONS, merged, named, require_saveable, write_note
from flowsolve.adapters.diffusers.tables import table_size
from flowsolve.adapters.diffusers.timetable import Timetable, number, one_time
from flowsolve.adapters.diffusers.unshifted import Unshifted
from flowsolve.noise import Noise
from flowsolve.predictions import SingularEstimate
from flowsolve.solvers import DDIM, Auto

require("diffusers", "diffusers", "a scheduler for its pipelines")
# Loading a pipeline looks for these two in the module that a component's class is from.
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin  # noqa: E402
from diffusers.utils import BaseOutput  # noqa: E402

__all__ = ["ConfigMixin", "Scheduler", "SchedulerMixin", "StepOutput"]


@dataclass
class StepOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: the sample that the network is to be evaluated on next, or the result.
        pred_original_sample: ẑ from this evaluation.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class _Own(threading.local):
    """What each thread has to itself."""

    table: Timetable | None = None
    run: Run | None = None
    begin: int | None = None


class Scheduler(SchedulerMixin, ConfigMixin):
    """A solver of flowsolve as a scheduler of diffusers.

    Args:
        config: the pipeline's scheduler or its configuration, `pipe.scheduler.config`, or those of another `Scheduler`;
            or the pipeline itself, and a UserWarning says if it is known to be distilled.
        solver: a solver of `flowsolve.solvers` on a fixed grid, its name in lower case ("unipc", "dpmsolver++", "heun",
            …), or "auto". By name, multistep solvers have the configuration's order (`solver_order`, by default 2) and
            `lower_order_final`.
        grid: a spacing of `flowsolve.grids` or its name, explicit flow times (one more than steps), or `grids.At`. By
            default the configuration's own noise levels; with "auto" the grid of its choice.
        chart: for Runge–Kutta solvers, as in `flowsolve.sample`.
        final: a final policy, as there; by default the end that the configuration says.
        seed: the noise of the steps, where a pipeline hands no generator to them.
        **changes: of the configuration: timestep_spacing, shift, prediction_type, ….

    Raises:
        TypeError: a solver that chooses its own steps, or an option that neither we nor the scheduler has.
        ValueError: a scheduler, solver or grid that is not known.

    Examples:
        >>> scheduler = Scheduler.from_config({"_class_name": "DDIMScheduler"}, solver="heun", grid="trailing")
        >>> scheduler.set_timesteps(3)
        >>> scheduler.order, scheduler.nfe, scheduler.timesteps.tolist()
        (2, 5, [999.0, 666.0, 666.0, 332.0, 332.0])
    """

    _like: Any = None  # another solver, whose nodes are taken

    config_name = "scheduler_config.json"
    has_compatibles = False

    def __init__(
        self,
        config: Any,
        solver: Any = None,
        grid: Any = None,
        *,
        chart: Any = None,
        final: Any = None,
        seed: int | None = None,
        **changes: Any,
    ) -> None:
        if isinstance(config, DiffusionPipeline):
            warn_if_distilled(config)
            config = config.scheduler
        live = config._options if isinstance(config, Scheduler) else {}
        if not isinstance(config, Mapping | SchedulerMixin):
            raise TypeError(f"config is a {type(config).__name__}; expected that of a scheduler, pipe.scheduler.config")
        known = completed(config)
        name = known["_class_name"]
        strange = [k for k in changes if k not in known]
        if strange:
            raise TypeError(
                f"{strange[0]!r} is no option of Scheduler ({', '.join(OPTIONS)}) or of {name}; drop it, see "
                "pipe.scheduler.config (where options of other classes are only carried along), or give a scheduler of "
                f"a class that has it: X.from_config(pipe.scheduler.config, {strange[0]}=...)"
            )
        if solver is None and isinstance(before := (known.get(OURS) or {}).get("solver"), str):
            solver = before
        given = {"solver": solver, "grid": grid, "chart": chart, "final": final, "seed": seed}
        self._options: dict[str, Any]
        self._options, ours = merged(given, live, known.get(OURS) or {})
        self._by_name = isinstance(self._options["solver"], str)
        method = as_configured(named(self._options["solver"]), self._options["solver"], {**known, **changes})
        self._options["solver"] = method
        if getattr(method, "chooses_steps", False):
            raise TypeError(
                f"{method!r} chooses its own steps and needs the loop; use flowsolve.adapters.diffusers.capture(pipe, "
                "…), or a solver on a fixed grid (adaptive=False, if it has that)"
            )
        told = config if isinstance(config, Mapping) else config.config  # with what is only carried along
        kept = {k: v for k, v in {**told, **known, **changes}.items() if not k.startswith("_") and k != OURS}
        left = [k for k in unstated(config, name) if k not in changes]
        asked = [*dict.fromkeys([*(known.get(OURS) or {}).get("asked", ()), *changes])]
        self.register_to_config(**kept, **{OURS: {"scheduler": name, "unstated": left, "asked": asked, **ours}})
        self._reading: tuple[Any, Reading] | None = None
        self._shared: Timetable | None = None
        self._own = _Own()
        _ = self.reading  # what is not supported is an error here

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any) -> Any:
        """A scheduler from `pipe.scheduler.config`; options as those of the class."""
        made = cls(config, **options)
        return (made, {}) if return_unused_kwargs else made

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write scheduler_config.json, from which `from_pretrained` makes the same scheduler, and a note.

        Raises:
            ValueError: a setting that has no JSON, such as η as a function.
        """
        require_saveable(self.config[OURS])
        write_note(Path(save_directory), __name__, self.config[OURS]["scheduler"])
        super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The configuration as JSON, with the class that it was read from: a file of that scheduler, and of ours."""
        content = json.loads(super().to_json_string())
        content["_class_name"] = self.config[OURS]["scheduler"]
        content[OURS]["install"] = INSTALL  # diffusers prints the entry where it does not know it
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def __copy__(self) -> Scheduler:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__, _own=_Own(), _shared=self._own.table or self._shared)
        return made

    def __deepcopy__(self, memo: Any) -> Scheduler:
        return copy.copy(self)  # what is shared is never changed

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_own", "_reading", "_shared")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _own=_Own(), _reading=None, _shared=None)

    # --- what a pipeline reads ----------------------------------------------------------------------------------------

    @property
    def reading(self) -> Reading:
        """The training convention; read anew if a pipeline has replaced the configuration."""
        if self._reading is None or self._reading[0] is not self._internal_dict:
            self._reading = (self._internal_dict, read(self._internal_dict))
        return self._reading[1]

    @property
    def solver(self) -> Any:
        """The solver, or "auto"'s choice once the time steps are set."""
        table = self._own.table or self._shared
        return self._options["solver"] if table is None else table.plan.solver

    @property
    def order(self) -> int:
        """Evaluations of a step: image-to-image pipelines begin at entry `order` · i of `timesteps`."""
        return int(getattr(self.solver, "evaluations", 1))

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the state that a pipeline starts from."""
        table = self._own.table or self._shared
        reading = self.reading
        if table is None:
            return float(start_std(reading, 0.0) * reading.shown(reading.path.at(0.0)))
        return float(table.plan.start * reading.shown(table.plan.points[0]))

    @property
    def timesteps(self) -> Tensor:
        """The network's time at each evaluation, float32."""
        return self._table.timesteps

    @property
    def sigmas(self) -> Tensor:
        """The noise level at each evaluation and at the end, float32 on the host: σ for a flow, σ/α otherwise."""
        return self._table.sigmas

    @property
    def nfe(self) -> int:
        """Evaluations of the whole plan; of the pipeline's network as many, or twice as many under guidance."""
        return len(self._table.plan.times)

    @property
    def nodes(self) -> list[float]:
        """The flow times on which the solver steps: `fs.sample(…, grid=scheduler.nodes)`."""
        return self._table.plan.nodes

    @property
    def num_inference_steps(self) -> int | None:
        """The number of steps; None before `set_timesteps`."""
        table = self._own.table or self._shared
        return None if table is None else table.plan.steps

    @property
    def begin_index(self) -> int | None:
        """The entry at which the next run begins, if a pipeline has said so."""
        return self._own.begin

    @property
    def step_index(self) -> int | None:
        """The entry of the next evaluation; None when no run is under way."""
        return None if self._own.run is None else self._own.run.at

    @property
    def _step_index(self) -> int | None:
        return self.step_index

    @_step_index.setter
    def _step_index(self, index: Any) -> None:
        raise RuntimeError(
            "the pipeline moves the scheduler's counter to take a step twice (as Cosmos 1 does for ẑ), which a solver "
            "that remembers cannot follow; keep its own scheduler"
        )

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which entry of `timesteps` the next run begins."""
        self._own.begin = begin_index

    # --- what a pipeline calls ----------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay out a solve of so many steps.

        Args:
            num_inference_steps: steps; each costs `order` evaluations, but for a last one to clean data, which costs 1.
            device: where `timesteps` will be.
            timesteps: or the network's times at which steps begin, taken as they are.
            sigmas: or the noise levels at which steps begin: σ/α, or for a flow the noise fractions before the shift. A
                trailing 0 is the clean end.
            mu: of a shift that depends on the image's size.

        Raises:
            ValueError: none of the three, or nodes that are no grid; timesteps and sigmas together that are not the
                same before the shift (as CogView4's, whose network is told the level before it).
        """
        unshifted = None
        if timesteps is not None and sigmas is not None:
            unshifted = Unshifted.of(self.reading, timesteps, sigmas, mu)
            timesteps, sigmas = None, unshifted.told(sigmas, self._spaced)
        given = [v for v in (timesteps, sigmas) if v is not None]
        if num_inference_steps is None and not given:
            raise ValueError("give one of num_inference_steps, timesteps and sigmas")
        listed = [float(v) for v in given[0]] if given else []
        if given and num_inference_steps not in (None, len(listed)):
            raise ValueError(
                f"num_inference_steps = {num_inference_steps} beside {len(listed)} values; give one of them"
            )
        o = self._options
        try:
            plan = lay(
                self.reading, o["solver"], o["grid"], o["chart"], o["final"], mu=mu, by_name=self._by_name,
                like=self._like, steps=None if given else num_inference_steps,
                timesteps=listed if timesteps is not None else None, sigmas=listed if sigmas is not None else None,
            )  # fmt: skip
        except SingularEstimate as error:
            raise SingularEstimate(advised(error, self.reading)) from error
        table = Timetable.of(plan, unshifted, device)
        self._own.table, self._own.run, self._own.begin = table, None, None
        self._shared = table

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input at a sample."""
        reading = self.reading
        if reading.said.precondition is None and not reading.stretched:
            return sample
        place = self._table.place(timestep)
        point = self._table.plan.points[place] if place is not None else reading.path.at(self._time(timestep))
        return sample * reading.scale(point)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        prev_timestep: Any = None,
        per_token_timesteps: Tensor | None = None,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Take the network's output at a sample, and return the sample to evaluate next.

        Args:
            model_output: the network's output, guided or not; of the sample's shape, or with twice its channels where
                the second half is a learned variance, which is not used.
            timestep: the entry of `timesteps` that it was asked at.
            sample: what it was asked about, shape (B, *S).
            eta: for a `DDIM` solver: its η, if not 0, for this run.
            use_clipped_model_output: for DDIMPipeline; ε̂ always matches a clipped ẑ here.
            generator: names the noise of the steps; read once, at the first step of a run.
            return_dict: return a `StepOutput`, or a tuple of the same.
            prev_timestep: of the unCLIP kind, where this step leads; the plan has its own.
            per_token_timesteps: of LTX's conditions; times that are all one, and then model_output is −1 times the
                network's, as that kind takes it.

        Raises:
            ValueError: an output of another shape, or a run that would begin within a step.
        """
        table, own = self._table, self._own
        model_output = one_time(model_output, per_token_timesteps)
        variance = self.config.get("variance_type") in ("learned", "learned_range")
        if variance and model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}; expected the sample's, {tuple(sample.shape)}"
            )
        run = own.run
        at = table.index(timestep, own.begin if run is None else run.at)
        if run is None or run.at != at:
            run = own.run = self._begin(table.plan, at, sample, eta, generator)
        ahead, data = run.advance(model_output, sample)
        if run.at is None:
            own.run = None
        return StepOutput(ahead, data) if return_dict else (ahead, data)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """α z + σ ε at times of the network, one or one a sample, as a sample is shown; in the samples' dtype."""
        times = hosted(timesteps).detach().cpu().double().reshape(-1)
        known = self._own.table or self._shared
        t = hosted((self.reading if known is None else known).native(times)).clamp(0.0, 1.0)
        point = self.reading.path.at(t.expand(len(original_samples)) if t.numel() == 1 else t)
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        shown, device = self.reading.shown(point), original_samples.device
        mixed = linear(point.alpha * shown, original_samples.to(wide), point.sigma * shown, noise.to(device, wide))
        return mixed.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """`add_noise`, as flow pipelines call it."""
        if noise is None:
            raise ValueError("scale_noise needs the noise; expected a tensor of the sample's shape as noise=")
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return table_size(self.config)

    @property
    def _spaced(self) -> bool:
        return self._options["grid"] is not None or isinstance(self._options["solver"], Auto)

    # --- within -------------------------------------------------------------------------------------------------------

    @property
    def _table(self) -> Timetable:
        table = self._own.table or self._shared
        if table is None:
            raise ValueError("no time steps are set; call set_timesteps(num_inference_steps) first")
        return table

    def _time(self, timestep: Any) -> float:
        """The flow time of a time of the network."""
        table = self._own.table or self._shared
        return float((self.reading if table is None else table).native(number(timestep)))

    def _begin(self, plan: Plan, at: int, sample: Tensor, eta: float | None, generator: Any) -> Run:
        solver, stepper = plan.solver, None
        if eta:
            if not isinstance(solver, DDIM):
                raise ValueError(f"eta = {eta} is DDIM's; {solver!r} has its own setting, give it to the solver")
            solver = replace(solver, eta=float(eta))
            stepper = solver.on(plan.reading.path, None, plan.intervals)
        noise = Noise.for_batch(seeds(sample, generator, self._options["seed"]), len(sample)) if solver.random else None
        return Run(plan, at, sample, noise, stepper)
