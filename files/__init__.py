"""What is on disk: read strictly, written whole.

    json_files     JSON, and the type and the range of a value
    writing        a file appears whole or not at all
    hub            a model's name -> its folder
    weights        a folder -> the model, and back; the table of model families
    tokenizer      text -> token ids, and back
    template       a conversation -> text, by the checkpoint's jinja program
    rows           data files -> rows
    conversations  a row -> its messages, and what is learned
    token_cache    the token ids of a data file, in arrays
    fingerprint    what a run was made from, in a few hashes
    peft_files     adapters in PEFT's format
    merging        an adapter into the model's files
"""
