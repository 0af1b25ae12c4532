"""The tables and pictures of docs/bench: `python -m bench ladder`.

    __main__           the rows of each table; runs them, each in a process of its own
    tables, plots      what the numbers become
    transformers_peft  the same job in transformers + PEFT
    serving            serve.py beside transformers' generate: `python -m bench serving`
    faults, mutations  killed runs and damaged files: `python -m bench faults`
    matrix_limit       how fast the machine multiplies in a model's shapes
"""
