from hypothesis import settings

# the same examples on every machine, and no example fails because a machine is slow
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
