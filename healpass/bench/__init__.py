"""`healpass bench`: what each precision costs, side by side in one run.

Read `contenders` (what is compared), `workloads` (doing what), `worker` (one process per
contender), `run` (rounds, medians and the gate), `budget` (what number formats may cost), `table`
(CSV, terminal, plot).
"""
