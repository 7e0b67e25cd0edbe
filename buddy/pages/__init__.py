"""What a group looks at in W&B: a study's page, over the runs that its jobs have logged and beside the tables.

`runsets` says which runs a line is made of, `page` lays the page out, `report` saves it,
and `sweeps` makes a W&B Sweep of each ablation.
"""
