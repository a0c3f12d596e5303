"""How each inference engine is started, asked whether it serves, measured and stopped.

Pure functions: an application's facts go in as a :class:`~controller.engines.model.LaunchSpec`, a
:class:`~controller.engines.model.Launch` comes out. Nothing here talks to Kubernetes or to an engine.
"""
