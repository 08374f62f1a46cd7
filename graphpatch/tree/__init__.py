"""A model as data, and what selectors find in it. Only `snapshot.py` knows torch.

`tree` is the data, `snapshot`, `text` and `headers` are where it comes from. `compile` makes a selector concrete,
`match` finds what it matches in one pass, `bindings`, `stacks` and `nearmiss` say more about the result; `compress`
goes the other way, from nodes to selectors. `diff` tells two trees apart.
"""
