"""stub"""
import hashlib, os
from pathlib import Path
from moda_jax.data.prepare import prepare, is_prepared
from moda_jax.data.units import list_files
def prepared_folder(source, cache_dir, *, tokenizer, text_field="text", on_error="stop", workers=None, say=print):
    if is_prepared(source): return Path(source)
    _, paths, _ = list_files(source)
    h=hashlib.blake2b(digest_size=6)
    for p in paths: h.update(Path(p).read_bytes()); h.update(str(p).encode())
    h.update(tokenizer.fingerprint.encode()+text_field.encode())
    out=Path(cache_dir)/h.hexdigest()
    prepare(source,out,tokenizer=tokenizer,text_field=text_field,workers=workers,on_error=on_error,say=say,quiet=True)
    return out
