"""The shared-context engine: a decoder runs on packed tokens, each context once for all of its targets.

Reading order, which is also the order of a forward pass:

1. ``passes``: what is computed. A prefix without gradients, then tree rows of contexts with their targets.
2. ``decoder``: ``PackedDecoder`` changes a transformers decoder, once, and runs it on packed tokens.
3. ``attention``: the attention function of its layers, which lays out packed tokens in cells and packs them again.
4. ``row_blocks``, ``sequences``: the two layouts. Padded blocks run everywhere; variable-length sequences, which need
   no padding, run on GPUs in half precision.
5. ``packing``: gathers and scatters between packed tokens and cells, with their gradients.
6. ``lean_modules``: leaner forward functions of MLPs and norms.
7. ``prefix_cache``: prefixes kept from one epoch to the next.
8. ``kept_contexts``: prefixes kept from one request to the next, and extended.

Words: *packed* tokens stand one after the other without padding. A *row* is a context's tail with the branches of its
targets. A *cell* is an entry of a layout that holds a token or padding. The *header* is the text that all prompts begin
with; *earlier* tokens are those of a header or prefix computed before.
"""
