"""The interfaces of other libraries, on flowsolve's solvers."""
