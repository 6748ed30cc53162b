r"""`solver="auto"` against our own best in hindsight and that of diffusers and k-diffusion, on problems not chosen on.

    python benchmarks/auto.py                                 # the judging half, without networks: some minutes
    python benchmarks/auto.py --only digits-ddpm patches-condot --checkpoints FOLDER
    python benchmarks/auto.py --search                        # the choosing half: what the rules were chosen by

**The split** is in `sections/fields.py`, and was written down before the search.

**The rule.** For every kind of path and every budget the search measures a few hundred pairs of solver and grid on all
problems of the choosing half, divides each error by the best on that problem, and ranks pairs by the largest of these
ratios: what is never bad, rather than best on average. The rows of `flowsolve.solvers.auto` are the winners, with
neighbouring budgets merged where that loses little.

**Judged** are the errors of `auto` over the best in hindsight, at each budget and problem: of ours, over the pairs of
`sections/choices.py` and the named solvers on plain grids; of the peers, over all their samplers × grids
(`sections/samplers.py`), on the paths that they know. Targets: within 1.5 × ours in the geometric mean and 3 × at worst;
never behind the peers'.
"""
