"""Running on many devices: the mesh and the sharding of parameters and batches, several processes, hardware facts.

To read in this order: `sharding` (mesh, parameters, gathers in a step), `distributed` (several processes), `hardware`.
"""
