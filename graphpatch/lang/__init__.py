"""The rule language: text to typed rules and back, and what is wrong with them. No torch, no model.

`parser` reads, `formatter` writes, `syntax` is what stands between; `program` puts a file together with all it uses;
`evaluate` works out expressions; `diagnostics` is how everything in graphpatch says what is wrong. The reference of the
language is `rules.lark`.
"""
