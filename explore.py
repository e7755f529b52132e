"""Exploration on the device: times everything, writes raw lines."""
import sys, time, json, os
sys.path.insert(0, "benchmarks")
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
import torch

def compile_one(job):
    from gossamer import nvrtc
    try:
        nvrtc.compile(job[0], dict(job[1]), "sm_90a"); return None
    except Exception as e:
        return str(e)[:300]

def jobs(types=(0, 1, 2)):
    from gossamer.spmm.kernels import cuda_windows as w, cuda_rows as r
    out = set()
    for kind in types:
        for rows in (8, 16, 32):
            for cols in (1, 2, 4, 8, 16):
                if cols > w.lane_columns(10**6, kind, rows): continue
                for masked in (True, False):
                    for warps in (4, 16):
                        if warps == 16 and rows * cols > 128: continue
                        if kind == 1 and warps == 16: continue
                        f = w.function(kind, rows, cols, masked, warps); out.add((f.file, f.macros))
            f = w.sum_function(kind, rows); out.add((f.file, f.macros))
        for vectors in (1, 2, 4, 8, 16, 32, 64):
            for mean in (1, 5, 10, 20, 40, 100):
                f = r.function(kind, *r.shape_of(vectors * 16 // (4 if kind == 2 else 2), 4 if kind == 2 else 2, mean)); out.add((f.file, f.macros))
        f = r.function(kind, 1, 1, 1, "spmm_rows_sum"); out.add((f.file, f.macros))
    return sorted(out)

def precompile(types=(0, 1, 2)):
    t = time.time()
    todo = jobs(types)
    with ProcessPoolExecutor(16) as pool:
        bad = [e for e in pool.map(compile_one, todo, chunksize=2) if e]
    print(f"compiled {len(todo)} in {time.time()-t:.1f}s, {len(bad)} failed", bad[:2], flush=True)

def save_one(name):
    import numpy as np, spmm_matrices
    try:
        kind, shape, rows, cols = spmm_matrices.patterns(Path("data"))[name]()
        np.savez(f"/tmp/m_{name.replace('%','p')}.npz", kind=kind, shape=shape, rows=rows.astype(np.int32), cols=cols.astype(np.int32))
    except Exception as e:
        print("GEN", name, repr(e)[:300], flush=True)

def load_one(name):
    import numpy as np
    z = np.load(f"/tmp/m_{name.replace('%','p')}.npz")
    return str(z["kind"]), tuple(map(int, z["shape"])), z["rows"], z["cols"]

def generate():
    import spmm_matrices
    t = time.time()
    with ProcessPoolExecutor(14) as pool:
        list(pool.map(save_one, spmm_matrices.patterns(Path("data")), chunksize=1))
    print(f"generated in {time.time()-t:.1f}s", flush=True)

BAD = set(json.load(open("/tmp/bad.json"))) if os.path.exists("/tmp/bad.json") else set()

def probe():
    import subprocess
    labels = [f"cusparse_fp{d}_alg{i}" for d in (32, 16) for i in (1, 2, 3)] + ["fp16 vendor", "fp32 vendor", "fp16 cuda_rows", "fp16 cuda_windows", "tf32", "fp32 cuda_rows", "fp16 dense"]
    runs = {l: subprocess.Popen([sys.executable, "explore.py", "copter2"], env=os.environ | {"ONLY": l, "NS": "32", "OUT": "/tmp/p_" + l.replace(" ", "_")}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for l in labels}
    bad = []
    for l, r in runs.items():
        out = r.communicate()[0]
        if r.returncode or "RACE" in out:
            bad.append(l); print("BAD", l, r.returncode, [x for x in out.splitlines() if "rror" in x][:2], flush=True)
    json.dump(bad, open("/tmp/bad.json", "w"))

def main():
    import spmm_matrices, cusparse
    from gossamer import timing
    from gossamer.spmm import Csr, Way, registry
    Path(os.environ.get("OUT", "/tmp")).mkdir(exist_ok=True)
    out = open(Path(os.environ.get("OUT", "/tmp")) / "raw.jsonl", "a")
    dev = torch.device("cuda")
    names = sys.argv[1:]
    for name, make in spmm_matrices.patterns(Path("data")).items():
        if names and name not in names: continue
        t0 = time.time()
        try:
            p = load_one(name); a32 = spmm_matrices.csr(p, dev)
        except Exception as e:
            print(name, "FAILED", repr(e)[:300], flush=True); continue
        a16 = a32.to(dtype=torch.float16)
        gen = time.time() - t0
        for n in map(int, os.environ.get('NS', '8,32,128,512').split(',')):
            b32 = torch.randn(a32.shape[1], n, device=dev); b16 = b32.half()
            runners, prep, errs, outs = {}, {}, {}, {}
            ref = (a16.to(dtype=torch.float64).torch() @ b16.double())
            norm = ref.norm()
            for dt, a, b in (("fp32", a32, b32), ("fp16", a16, b16)):
                for alg, num in cusparse.CSR_ALGORITHMS.items():
                    try:
                        run, c = cusparse.product(a, b, num); run(); runners[f"cusparse_{dt}_{alg}"] = [run]
                        errs[f"cusparse_{dt}_{alg}"] = float((c.double() - ref).norm() / norm)
                    except Exception as e: print(name, n, dt, alg, repr(e)[:200], flush=True)
            if name.startswith(("band512", "blockdiag")):
                for label, num in (("bsr", 14), ("ell", 13)):
                    for block in (16, 32):
                        try:
                            run, c = cusparse.product(a16, b16, num, block); run(); runners[f"cusparse_fp16_{label}{block}"] = [run]
                            errs[f"cusparse_fp16_{label}{block}"] = float((c[:len(ref)].double() - ref).norm() / norm)
                        except Exception as e: print(name, n, label, repr(e)[:200], flush=True)
            for prec, a, b, tf in (("fp16", a16, b16, False), ("fp32", a32, b32, False), ("tf32", a32, b32, True)):
                for k in ("cuda_windows", "cuda_rows", "dense", "vendor"):
                    if prec == "tf32" and k != "cuda_windows": continue
                    K = registry[k]
                    if K.refuses(a): continue
                    for way in K.ways(a, tf):
                        label = f"{prec} {way}"
                        try:
                            torch.cuda.synchronize(); t = time.time()
                            pk = K.pack(a, n, **dict(way.knobs)); torch.cuda.synchronize(); prep[label] = time.time() - t
                            c = K.run(b, pk.tensors, pk.meta)
                            errs[label] = float((c.double() - ref).norm() / norm)
                            runners[label] = [partial(K.run, b, pk.tensors, pk.meta)]
                        except Exception as e: print(name, n, label, repr(e)[:300], flush=True)
            if only := os.environ.get("ONLY"):
                runners = {k: v for k, v in runners.items() if k.startswith(only) and os.environ.get("NOT", "?") not in k}
            try:
                plain = {k: runners.pop(k) for k in list(runners) if k in BAD and not os.environ.get("ONLY")}
                times = timing.race(runners, dev, 0.004)
                for k, calls in plain.items():
                    calls[0]()
                    times[k] = min(timing._timed(lambda: [calls[0]() for _ in range(20)], dev, 40) for _ in range(5)) / 20 * 1e6
            except Exception as e:
                print(name, n, "RACE", repr(e)[:300], flush=True); continue
            out.write(json.dumps({"matrix": name, "kind": p[0], "shape": a32.shape, "nnz": a32.nnz, "n": n, "times": times, "prep": prep, "errs": errs}) + "\n"); out.flush()
            best = lambda pre: min(((v, k) for k, v in times.items() if k.startswith(pre)), default=(float("inf"), "-"))
            base = best("cusparse_fp32")[0]
            o = min(((v, k) for k, v in times.items() if k.startswith("fp16 ") and "vendor" not in k), default=(9e9, "-"))
            tf = best("tf32"); f = best("fp32 cuda_rows")
            bad = {k: e for k, e in errs.items() if not e < 3e-3}
            print(f"{name:20s} N{n:4d} cs32 {base:8.1f} cs16 {best('cusparse_fp16_alg')[0]:8.1f} ours {o[0]:8.1f} {base/o[0]:5.2f}x {o[1]:42s} tf32 {base/tf[0]:5.2f} rows32 {base/f[0]:5.2f} {'BAD '+str(bad) if bad else ''}", flush=True)
            del runners
        torch.cuda.empty_cache()
        print(f"  {name} {time.time()-t0:.1f}s (gen {gen:.1f})", flush=True)

if __name__ == "__main__":
    {"precompile": precompile, "generate": generate, "probe": probe}.get((sys.argv[1:] or [""])[0], main)()
