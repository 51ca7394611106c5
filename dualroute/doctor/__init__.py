"""``dualroute doctor``; see :mod:`dualroute.doctor.command`."""
