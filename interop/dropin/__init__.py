"""torch's optimizers with a step that XLA compiles. `step` has the classes and a step in one screen."""
