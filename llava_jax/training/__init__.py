"""Training of one stage, on one host or many, with bit-exact resume.

To read in this order: `loop` (a run, top to bottom), `step` (equation 3 of the paper, its gradients, the update),
`loss`, `optim` (what a stage trains), `builder` (shapes, shardings and compilation), `setup`.
"""
