"""One lesson a file: what each technique is, its paper, its cost in bytes, and its code. Read them in any order.

    attention      the kernel that never stores the T x T matrix
    loss           cross-entropy without the logits
    recompute      forget a layer's activations, compute them again
    optim          AdamW, and four ways to keep its states
    quant          frozen weights in 8 and 4 bits; nf4_triton is its GPU kernel
    half           weights in 16 bit on a device that multiplies float32 faster
    lora_init      where an adapter starts
    kv_cache       the keys and values of earlier tokens, for many conversations at once
    few_rows       products for a reply's next token, at the speed of memory
    sampling       from logits to the next token
    device         what this machine is good at
"""
