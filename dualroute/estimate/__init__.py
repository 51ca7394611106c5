"""``dualroute estimate``; see :mod:`dualroute.estimate.command`."""
