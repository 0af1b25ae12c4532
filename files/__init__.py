"""What is on disk: read strictly, written whole.

    json_files     JSON, and the type and the range of a value
    hub            a model's name -> its folder
    weights        a folder -> the model, and back; the table of model families
    tokenizer      text -> token ids, and back
    peft_files     adapters in PEFT's format
    merging        an adapter into the model's files
"""
