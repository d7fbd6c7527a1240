"""HumanOmni inside SGLang's processes: configuration, model and processor, found through an entry point.

Only these modules and ``rollout.sglang_host`` import sglang.
"""
