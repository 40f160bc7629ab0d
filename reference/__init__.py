"""Pure PyTorch references: what every operator must compute, slow and clear. Imports nothing but torch.

A reference page holds, beside the function itself: `cost()` (bytes and flops, with the arithmetic), `samples()` (inputs
that prove a backend) and `error()` (how far an output is from the float64 truth, in units of the best possible rounding
error; at most `BUDGET` passes). Where ops share a page, `<op>_cost` and so on are one
op's own, and `_truth.truth` finds them.
"""
