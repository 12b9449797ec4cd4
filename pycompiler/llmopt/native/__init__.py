"""The C++ kernels seen from Python: running one op by itself, and the registrations the planner selects from."""
