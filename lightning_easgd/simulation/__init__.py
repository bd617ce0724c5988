"""Any algorithm, center rule and gate with p replicas in one process, in virtual time: exact, and reproducible.

The algorithm objects that train are the ones that run here. Two drivers:

* ``Simulation`` is event-driven: each replica takes its own time for a step, messages take time to reach the center,
  and whatever happens at the center happens in the order of that time. Any replica, any local update.
* ``LockStep`` is the synchronous case at once: since nothing that a replica does between two exchanges can be seen by
  another, all replicas step as one (p, d) tensor. It gives the same results as ``Simulation``, bit for bit, at a cost a
  step that hardly grows with p; for algorithms that treat every number of the vector alike.

Objectives act on each coordinate by itself, so d coordinates are d runs of a one-dimensional problem: Monte Carlo at
the price of a few vector operations. A ``Loss`` is any function of the vector.

::

    simulation = Simulation.of(
        EASGD(period=4),
        Quadratic(noise=1.0),
        torch.ones(1000),
        num_replicas=8,
        lr=0.1,
        synchronous=False,
        compute_time=lambda random: random.expovariate(1.0),
    )
    simulation.run(num_steps=100)
    simulation.center.value.var()
"""

from lightning_easgd.simulation.centers import AsynchronousCenter, SynchronousCenter
from lightning_easgd.simulation.events import Duration, Event, Simulation
from lightning_easgd.simulation.lock_step import LockStep
from lightning_easgd.simulation.objectives import DoubleWell, Loss, MultiplicativeNoise, Objective, Quadratic
from lightning_easgd.simulation.replicas import Vector

__all__ = [
    "AsynchronousCenter",
    "DoubleWell",
    "Duration",
    "Event",
    "LockStep",
    "Loss",
    "MultiplicativeNoise",
    "Objective",
    "Quadratic",
    "Simulation",
    "SynchronousCenter",
    "Vector",
]
