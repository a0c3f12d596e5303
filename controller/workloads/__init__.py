"""The Kubernetes APIs that run serving groups, behind one interface: LeaderWorkerSet, RoleBasedGroup, Deployment.

Pure functions: a :class:`~controller.workloads.model.Serving` and what exists go in, a
:class:`~controller.workloads.model.Plan` of objects comes out.
"""
