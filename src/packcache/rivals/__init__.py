"""Other people's methods: one file each, with its source and what ours does differently.

A file holds what is peculiar to a method, in integers; `policies.py` makes a policy of it and gives
it its name. So a rival keeps every promise of a policy: nested sets, one set for all branches.
"""
