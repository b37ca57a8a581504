"""What the demo needs and no model hub has to give: a small base model, a data set and its training recipe.

`base_model` makes and caches the base model, `triage` the support-ticket data set, `testing` tiny random models for
unit tests. Importing any of them brings in no torch.
"""
