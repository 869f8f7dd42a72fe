"""The formulas of preference alignment as pure functions of tensors.

Modules are imported by name (`from rayalign.maths.preference import dpo_loss`). All of them:
compute in float32 at least and leave float64 as it is; give unreduced losses, one value an example or
a token; take a `mask` (1 = counts) where they sum, and what is masked may be NaN or infinite; raise
ValueError for a bad argument; and talk to other ranks only through a `group` that they are given.
"""
