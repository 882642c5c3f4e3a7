#| export
from dataclasses import dataclass, field
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from gradmax_nb.measure import (Lift, apply_layer, incoming_weight, lift_of, measure, outgoing_weights, settle, untouched, zero_buds,
    _base, _loss, _pad, _z_shape, as_batches)
from gradmax_nb.optim import check_optimizer, learning_rates, optimizer_guard, rebind
from gradmax_nb.sites import NewNeurons, Site, as_inputs, evaluating, make_buds, run_path, widen
from gradmax_nb.surgery import surgery_guard

#| export
@dataclass
class Growth:
    "What one growth did at one site."
    site:Site             # Where
    old_width:int         # Neurons before
    new_width:int         # Neurons after
    sigma:torch.Tensor    # `(k,)`: singular values, or what the method ranks by
    predicted:float       # Norm of the gradient autograd will measure on the new weights that start at zero
    method:object         # The method
    loss:float            # Loss of the growth batch before growing
    mirror:bool           # True if the outgoing weights are the ones that start at zero
    notes:list=field(default_factory=list) # What was decided about activations and norms, in words

    def __repr__(self): return f"Growth({self.site.name}: {self.old_width} -> {self.new_width}, {self.method}, predicted={self.predicted:.4g})"

#| export
def _shift(m, V, j, buds):
    "What reader `j`'s bias must take up, `(d_out,)`, or None; raises `ValueError` where no bias can."
    c,name = m.site.consumers[j],m.site.readers[j].name
    z = _base(m, m.batches[0].x.new_zeros(_z_shape(m, m.batches[0].x[:2], len(V))))
    a = run_path(m.site, z, buds, m.point.lifts)[j]
    if a.abs().max() <= 1e3*lift_of(a.dtype): return None
    out = apply_layer(c, _pad(c,a), outgoing_weights(m,V)[j])
    out = (out.transpose(0,1) if not isinstance(c,nn.Linear) else out.movedim(-1,0)).flatten(1)
    spread = (out.max(1).values-out.min(1).values).max()
    if spread > 1e-5*out.abs().max(): raise ValueError(f"`{m.site.name}`: new neurons start with a constant that `{name}` sees differently at its padded borders, so its bias cannot take it up; use a mirror method (zero outgoing weights)")
    if c.bias is None: raise ValueError(f"`{m.site.name}`: new neurons start with a constant, and `{name}` has no bias to take it up; give it a bias or use a mirror method (zero outgoing weights)")
    return -out[:,0]

#| export
def _new_neurons(m, p):
    "The proposal `p` as weights in the layout of the layers, and the hooks that go with them."
    k,weights = len(p.incoming),tuple(outgoing_weights(m,p.outgoing))
    if p.mirror:
        buds = settle(m, p.incoming, make_buds(m.site,k))
        return NewNeurons(incoming_weight(m,p.incoming), weights, buds=buds),{}
    buds = zero_buds(m.site, k, m.point)
    shifts = tuple(_shift(m,p.outgoing,j,buds) for j in range(len(weights)))
    bias = None if m.site.producer.bias is None else m.weight.new_full((k,), m.point.bias)
    return NewNeurons(incoming_weight(m,p.incoming), weights, bias, buds, shifts),m.point.lifts

#| export
def _attach_lifts(site, lifts, old_width):
    "Hooks that keep new neurons above zero behind layers without a bias; a hook of an earlier growth covers later ones."
    for name,value in lifts.items():
        layer = site.model.get_submodule(name)
        if not any(isinstance(h,Lift) for h in layer._forward_hooks.values()): layer.register_forward_hook(Lift(old_width,value))

#| export
def _request(model, site, k):
    "Check and normalise `site` and `k`; returns lists of equal length."
    sites = list(site) if isinstance(site, (list,tuple)) else [site]
    ks = list(k) if isinstance(k, (list,tuple)) else [k]*len(sites)
    if len(ks)!=len(sites): raise ValueError(f"{len(ks)} counts were given for {len(sites)} sites: give one number, or one per site")
    for s in sites:
        if not isinstance(s, Site): raise TypeError(f"grow needs a Site, got {type(s).__name__}: take one from find_sites(model, xb), or declare it with declare_site")
    for n in ks:
        if isinstance(n,bool) or not isinstance(n,int) or n<1: raise ValueError(f"k must be a whole number of at least 1, got {n!r}")
    if len({s.name for s in sites})<len(sites): raise ValueError("a site is listed twice: grow it once with the larger k")
    return [s.on(model) for s in sites],ks

#| export
def _check_trainable(site):
    "Refuse frozen and half-precision layers."
    for name,m in ((site.name,site.producer),*zip((r.name for r in site.readers),site.consumers)):
        if m.weight.dtype not in (torch.float32,torch.float64): raise ValueError(f"`{name}` has {m.weight.dtype} weights, too coarse to measure growth with; keep the weights in float32 and train under autocast")
        if not m.weight.requires_grad: raise ValueError(f"`{name}` is frozen (requires_grad=False), so new weights there would never learn; unfreeze it before growing `{site.name}`")

#| export
def _composed(swaps):
    "Swaps with chains `a -> b -> c` shortened to `a -> c`: a layer can be reader of one site and producer of the next."
    out = []
    for old,new in swaps:
        i = next((i for i,(_,last) in enumerate(out) if last is old), None)
        if i is None: out.append((old,new))
        else: out[i] = (out[i][0],new)
    return out

def _held(sites):
    "Parameters that growing `sites` will replace."
    layers = [m for s in sites for m in (s.producer,*s.consumers,*(s.model.get_submodule(n) for n in make_buds(s,1)))]
    return list({id(p):p for m in layers for p in m._parameters.values() if p is not None and p.requires_grad}.values())

#| export
def grow(
    model:nn.Module,  # Model; changed in place, its module objects stay
    site,             # A `Site`, or a list of sites that grow together
    k,                # New neurons: one number, or one per site
    method,           # How they get their weights: `GradMax()`, `BoundMax()`, ...
    batch,            # Growth batch `(xb, yb)`, or an iterable of such pairs
    loss_func,        # Loss of the training, `loss_func(model(xb), yb)`
    opt=None          # Its optimizer (torch or fastai), which follows; None if there is none yet
):                    # A `Growth`, or a list of them if `site` is a list
    "Add `k` neurons at `site` without changing what the model computes; all or nothing."
    model = getattr(model, '_orig_mod', model)
    sites,ks = _request(model, site, k)
    for s in sites: _check_trainable(s)
    if opt is not None: check_optimizer(opt, model, params=_held(sites))
    ms = measure(model, sites, batch, loss_func, lr=max(learning_rates(opt)) if opt is not None else None)
    with untouched(model): plans = [_plan(m, n, method) for m,n in zip(ms,ks)]
    records = [_record(m, p, method) for m,(p,_,_) in zip(ms,plans)]
    with surgery_guard(model), optimizer_guard(opt):
        swaps = []
        for s,(_,new,lifts) in zip(sites,plans):
            width = s.width
            swaps += widen(s, new)
            _attach_lifts(s, lifts, width)
        rebind(opt, _composed(swaps))
    return records if isinstance(site, (list,tuple)) else records[0]

#| export
def _plan(m, k, method):
    "Proposal, weights and hooks for one site."
    p = method.propose(m, k)
    if not p.predicted==p.predicted or p.predicted==float('inf'): raise ValueError(f"`{m.site.name}`: the gradient of the growth batch is not finite; check the inputs and the loss, or lower the learning rate")
    if not torch.isfinite(p.incoming).all() or not torch.isfinite(p.outgoing).all(): raise ValueError(f"`{m.site.name}`: {method} proposed weights that are not finite; check the growth batch and the length rule")
    return (p,*_new_neurons(m,p))

def _record(m, p, method):
    return Growth(m.site, m.site.width, m.site.width+len(p.incoming), p.sigma.detach().cpu(), float(p.predicted), method, m.loss, p.mirror, [] if p.mirror else list(m.point.notes))

#| export
def measured_norm(
    rec:Growth, # Record of the last growth at its site
    batch,      # The same growth batch
    loss_func   # The same loss
)->float:
    "Gradient norm of the new weights that start at zero, by autograd on the grown model."
    site = rec.site
    weights = [c.weight for c in site.consumers] if rec.mirror else [site.producer.weight]
    with untouched(site.model), torch.enable_grad():
        pairs = as_batches(batch)
        sizes = [len(as_inputs(xb)[0]) for xb,_ in pairs]
        loss = sum(_loss(site.model,xb,yb,loss_func)*n/sum(sizes) for (xb,yb),n in zip(pairs,sizes))
        grads = torch.autograd.grad(loss, weights)
    if not rec.mirror: return grads[0][rec.old_width:rec.new_width].norm().item()
    new = [g[:,rec.old_width*r.spread:rec.new_width*r.spread] for g,r in zip(grads,site.readers)]
    return torch.cat([g.flatten() for g in new]).norm().item()

#| export
def count_flops(
    model:nn.Module, # Model
    xb               # Example input
)->int:
    "FLOPs of one forward pass on `xb`, by torch's own counter (a multiply-add counts as 2)."
    with evaluating(model), FlopCounterMode(display=False) as counter: model(*as_inputs(xb))
    return counter.get_total_flops()
