"""Speed and memory of this project beside diffusers', by `scripts/benchmark.py`: two processes, one a side, in
alternation on the same weights and inputs.

cases, workloads: what is measured and aimed at    models: weights and inputs that both sides get
ours, training, feeding: our side's work        theirs: diffusers'
worker: the process of one side                 sides: how it is spoken to
measure: one row                                processes: rows of whole fresh processes
stats, machine: figures                         bench: all rows, kept as they come    report: table and page
"""
