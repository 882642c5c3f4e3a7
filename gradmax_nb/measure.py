#| export
import itertools
import random
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from gradmax_nb.sites import Site, apply_bud, as_inputs, kept_buffers, make_buds, put_back, run_path

#| export
# Spelled out per dimension: torch has no convolution that works for any number of them.
_convs = {nn.Conv1d:(F.conv1d, nn.grad.conv1d_weight, nn.grad.conv1d_input), nn.Conv2d:(F.conv2d, nn.grad.conv2d_weight, nn.grad.conv2d_input),
          nn.Conv3d:(F.conv3d, nn.grad.conv3d_weight, nn.grad.conv3d_input)}

#| export
def _pads_itself(m): return isinstance(m, _ConvNd) and (m.padding_mode!='zeros' or isinstance(m.padding, str))

def _pad(m, x):
    "Pad `x` as the convolution `m` would, where its padding is not a plain number of zeros."
    if not _pads_itself(m): return x
    return F.pad(x, m._reversed_padding_repeated_twice, mode='constant' if m.padding_mode=='zeros' else m.padding_mode)

def _geometry(m): return m.stride, 0 if _pads_itself(m) else m.padding, m.dilation

#| export
def apply_layer(
    m:nn.Module,    # Linear or convolution: gives the geometry, not the weights
    x:torch.Tensor, # Input, padded already where `_pad` does so
    w:torch.Tensor  # Weights to use instead, `(out, in, ...)`
)->torch.Tensor:
    "The layer `m` with other weights and no bias."
    if isinstance(m, nn.Linear): return F.linear(x, w)
    stride,padding,dilation = _geometry(m)
    return _convs[type(m)][0](x, w, None, stride, padding, dilation)

#| export
def weight_gradient(
    m:nn.Module,    # Linear or convolution
    x:torch.Tensor, # Its input
    g:torch.Tensor  # Gradient at its output
)->torch.Tensor:    # `(out, in, ...)`
    "Gradient of the weights of `m`, for any number of input and output channels."
    if isinstance(m, nn.Linear): return g.flatten(0,-2).T @ x.flatten(0,-2)
    stride,padding,dilation = _geometry(m)
    return _convs[type(m)][1](x, (g.shape[1],x.shape[1],*m.kernel_size), g, stride, padding, dilation)

#| export
def input_gradient(
    m:nn.Module,    # Linear or convolution
    shape:tuple,    # Shape of its input
    w:torch.Tensor, # Weights `(out, in, ...)`
    g:torch.Tensor  # Gradient at its output
)->torch.Tensor:
    "Gradient of the input of `m` with weights `w`."
    if isinstance(m, nn.Linear): return g @ w
    stride,padding,dilation = _geometry(m)
    return _convs[type(m)][2](shape, w, g, stride, padding, dilation)

#| export
@dataclass
class Captured:
    "What one batch says about one site."
    x:torch.Tensor  # Input of the producer, padded
    deltas:list     # Per reader: gradient of the loss at its output, times this batch's share
    inputs:list     # Per reader: its input

@contextmanager
def recording(
    sites:list,   # Sites to record
    extra=None    # Called as `extra(site, j, x)`; what it returns is added to the output of reader j
):
    "Record producer inputs, reader inputs and the autograd edges of reader outputs while the model runs."
    seen = {s.name:dict(x=None, edges=[None]*len(s.readers), inputs=[None]*len(s.readers)) for s in sites}
    handles = [h for s in sites for h in _attach(s, seen[s.name], extra)]
    try: yield seen
    finally:
        for h in handles: h.remove()

#| export
def _plain(t): return t.detach().as_subclass(torch.Tensor) # fastai's tensor types must not travel into parameters

#| export
def _edge(out):
    "`out`, made to require a gradient, and the place in the graph where its gradient arrives."
    if not out.requires_grad: out = out + out.new_zeros(()).requires_grad_()
    return out,torch.autograd.graph.get_gradient_edge(out)

def _attach(site, seen, extra):
    "Hooks that fill `seen` for one site."
    def producer(m, args): seen['x'] = args[0]
    yield site.producer.register_forward_pre_hook(producer)
    for j,c in enumerate(site.consumers):
        def reader(m, args, out, j=j):
            if extra is not None: out = out + extra(site, j, seen['x'])
            out,seen['edges'][j] = _edge(out)
            seen['inputs'][j] = _plain(args[0])
            return out
        yield c.register_forward_hook(reader)

#| export
@contextmanager
def untouched(
    model:nn.Module # Model that is run to measure something
):
    "Restore buffers, training modes and every random number generator when the block ends."
    buffers,modes = kept_buffers(model),[(m,m.training) for m in model.modules()]
    rng,py,cuda,np_state = torch.get_rng_state(),random.getstate(),_cuda_states(),_numpy_state()
    try: yield
    finally:
        put_back(buffers)
        for m,mode in modes: m.training = mode
        torch.set_rng_state(rng)
        random.setstate(py)
        if cuda is not None: torch.cuda.set_rng_state_all(cuda)
        if np_state is not None: np_state[0].random.set_state(np_state[1])

#| export
def _cuda_states(): return torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

def _numpy_state():
    try: import numpy
    except ImportError: return None
    return numpy,numpy.random.get_state()

#| export
def samples_in(
    xb # Input of the model: a tensor, a tuple of them, or a dict
)->int:
    "Number of samples in one batch."
    while not isinstance(xb, torch.Tensor): xb = next(iter(xb.values() if isinstance(xb, dict) else xb))
    return len(xb)

#| export
def as_batches(
    batch # `(xb, yb)`, or an iterable of such pairs
)->list:
    "The growth batches as a list of pairs."
    def is_input(o): return isinstance(o, (torch.Tensor,dict)) or isinstance(o,(tuple,list)) and len(o)>0 and all(isinstance(t,torch.Tensor) for t in o)
    single = isinstance(batch, (tuple,list)) and len(batch)==2 and is_input(batch[0]) and not (isinstance(batch[0],(tuple,list)) and len(batch[0])==2 and isinstance(batch[1],(tuple,list)))
    pairs = [tuple(batch)] if single else [tuple(b) for b in batch]
    if not pairs: raise ValueError("the growth batch is empty: pass (xb, yb) or a non-empty iterable of such pairs")
    for p in pairs:
        if len(p)!=2: raise ValueError(f"a growth batch is a pair (xb, yb), not {len(p)} things")
        if samples_in(p[0])==0: raise ValueError("the growth batch has no samples: pass at least one")
    return pairs

#| export
def _loss(model, xb, yb, loss_func):
    "The scalar loss of one batch, with everything that can be wrong said clearly."
    loss = loss_func(model(*as_inputs(xb)), yb)
    if not isinstance(loss, torch.Tensor) or loss.numel()!=1: raise ValueError(f"loss_func must return one number, got {tuple(getattr(loss,'shape',()))}: use reduction='mean'")
    if not torch.isfinite(loss): raise ValueError(f"the loss of the growth batch is {loss.item()}: growth directions need a finite loss; check the inputs, or lower the learning rate")
    if not loss.requires_grad: raise ValueError("the loss does not depend on any site's output: nothing to grow from")
    return loss.reshape(())

#| export
def _capture(model, sites, pair, loss_func, extra=None, share=1.):
    "Run one batch; return the loss and one `Captured` per site."
    with torch.enable_grad(), recording(sites, extra) as seen:
        loss = _loss(model, *pair, loss_func)
        edges = [e for s in sites for e in seen[s.name]['edges']]
        for s in sites:
            if None in seen[s.name]['edges']: raise ValueError(f"`{s.readers[seen[s.name]['edges'].index(None)].name}` was not called for this batch, so site `{s.name}` cannot be measured")
        grads = iter(torch.autograd.grad(loss, edges, allow_unused=True))
    out = [Captured(_pad(s.producer, _plain(seen[s.name]['x'])), [_share(next(grads), s, share) for _ in s.readers], seen[s.name]['inputs']) for s in sites]
    return loss.detach(),out

#| export
def _share(g, site, share):
    "One batch's part of the gradient."
    if g is None: raise ValueError(f"the loss does not depend on what `{site.name}` feeds: its gradient does not exist")
    return _plain(g) if share==1 else _plain(g)*share

#| export
def lift_of(
    dtype:torch.dtype # Of the parameters
)->float:
    "A positive constant lost in rounding next to 1, yet not zero in half precision."
    return min(torch.finfo(dtype).eps/2, 2.**-24)

#| export
class Lift:
    "Forward hook that adds a constant to channels `start` and later; for layers without a bias."
    def __init__(self, start, value): self.start,self.value = start,value
    def __call__(self, module, args, out):
        axis = 1 if isinstance(module, (_ConvNd,_NormBase)) else out.dim()-1
        v = out.new_zeros(out.shape[axis])
        v[self.start:] = self.value
        return out + v.view(*(-1 if i==axis else 1 for i in range(out.dim())))

#| export
@dataclass
class OperatingPoint:
    "How new neurons with zero incoming weights are set up at one site."
    bias:float=0.                                 # Bias of the new neurons in the producer
    buds:dict=field(default_factory=dict)         # Layer name -> constant of its bias
    lifts:dict=field(default_factory=dict)        # Layer name -> constant added by a hook, for layers without a bias
    notes:list=field(default_factory=list)        # What was decided, in words

#| export
def zero_buds(
    site:Site,             # Where
    k:int,                 # Number of new neurons
    point:OperatingPoint   # Constants of their biases
)->dict:
    "Buds for neurons that start with zero incoming weights."
    buds = make_buds(site, k)
    for name,b in buds.items():
        if isinstance(b, _NormBase):
            if b.weight is not None: b.weight.fill_(b.eps**.5)
            if b.running_var is not None: b.running_var.zero_()
        if name in point.buds: b.bias.fill_(point.buds[name])
    return buds

#| export
def _starts(site):
    "Layers that begin a stretch: the producer, and each norm or depthwise convolution on the path."
    return [site.name] + [s.layer for s in site.path if s.layer and isinstance(site.model.get_submodule(s.layer), (_NormBase,_ConvNd))]

#| export
def _probe(site, z, start, value):
    "Derivative along a random direction of all that `start`'s stretch ends in, when `start` gives the constant `value`."
    ends,probe,g = [],torch.full_like(z, value).requires_grad_(),torch.Generator().manual_seed(0)
    def cut(name):
        def f(x, out):
            nonlocal probe
            ends.append(x)
            if name!=start: return torch.zeros_like(out).detach()
            probe = torch.full_like(out, value).detach().requires_grad_()
            return probe.clone()
        return f
    with torch.enable_grad():
        ends += run_path(site, probe if start==site.name else torch.zeros_like(z), make_buds(site,1), cuts={n:cut(n) for n in _starts(site)[1:]})
        total = sum((e*torch.rand(e.shape, generator=g).to(e)).sum() for e in ends)
    return _gradient(total, probe)

#| export
def _gradient(total, x):
    "Gradient of `total`, zeros where it does not depend on `x`."
    g = torch.autograd.grad(total, x, allow_unused=True, retain_graph=True)[0] if total.requires_grad else None # readers may share a part of the graph
    return torch.zeros_like(x) if g is None else g

def _same(a, b): return bool((a-b).norm() <= 1e-3*b.norm())

#| export
def operating_point(
    site:Site,     # Where
    z:torch.Tensor # Shaped like the producer's output with one channel: `(2, 1, ...)`, or `(2, ..., 1)` for a Linear; norms need two samples
)->OperatingPoint:
    "Decide how new neurons with zero incoming weights start; raises `ValueError` where they could never learn."
    point,lift = OperatingPoint(),lift_of(z.dtype)
    for name in _starts(site):
        above = _probe(site, z, name, lift)
        if above.any() and _same(_probe(site,z,name,0.), above): continue
        steep = above.norm() > 1e-3*_probe(site,z,name,1.).norm() # a squared ReLU has a slope there, but one as small as the lift
        value = lift if steep else _other_point(site, z, name)
        _hold(point, site, name, value, lift)
    _note_norms(point, site)
    return point

#| export
def _other_point(site, z, name):
    "A bias at which the activation behind `name` has a slope, since it has none at zero."
    slope = {b:_probe(site,z,name,b).norm().item() for b in (1.,-1.,.5,-.5,2.,-2.)}
    best = max(slope, key=slope.get)
    if not slope[best]: raise ValueError(f"new neurons of `{site.name}` would never learn: the activation behind `{name}` has derivative 0 at 0 and wherever else was tried; use a mirror method (zero outgoing weights)")
    if site.model.get_submodule(name).bias is None: raise ValueError(f"the activation behind `{name}` has derivative 0 at 0, and `{name}` has no bias to start elsewhere; give it one or use a mirror method (zero outgoing weights)")
    return best

#| export
def _hold(point, site, name, value, lift):
    "Let `name` hold the constant `value`: in its bias where it has one, else by a hook."
    if getattr(site.model.get_submodule(name), 'bias', None) is None: point.lifts[name],how = value,'a hook adds'
    elif name==site.name: point.bias,how = value,'new biases are'
    else: point.buds[name],how = value,'new biases are'
    why = "the activation's derivative jumps at 0" if value==lift else "the activation's derivative is 0 at 0"
    point.notes.append(f"`{name}`: {how} {value:.2g}, because {why}")

#| export
def _note_norms(point, site):
    for name,b in make_buds(site,1).items():
        if not isinstance(b, _NormBase): continue
        what = f"new scales are sqrt(eps)={b.eps**.5:.2g}, so that the norm's derivative is 1" if b.weight is not None else f"it has no scale, so gradients of the new neurons pass it times 1/sqrt(eps)={b.eps**-.5:.3g}"
        point.notes.append(f"`{name}`: {what}")

#| export
@dataclass(eq=False)
class Measurement:
    "What the growth batches say about one site."
    site:Site
    batches:list                 # One `Captured` per batch
    loss:float                   # Mean loss of the growth batches
    rerun:object=None            # `rerun(extra)` gives `(loss, batches)` with neurons added, see `with_neurons`
    virtual_loss:object=None     # `virtual_loss(extra)` gives the differentiable loss with neurons added
    lr:float=None                # Largest learning rate of the optimizer, where one was given
    seed:int=0                   # Seeds whatever a method draws at random

    @cached_property
    def point(self)->OperatingPoint:
        "Set-up of neurons with zero incoming weights."
        x = self.batches[0].x
        return operating_point(self.site, x.new_zeros(2, *_z_shape(self, x[:1], 1)[1:]))
    @cached_property
    def slopes(self)->list: return path_slopes(self)
    @cached_property
    def local(self)->bool: return _local(self)
    @cached_property
    def producer(self)->nn.Module: return self.site.producer
    @cached_property
    def consumers(self)->list: return self.site.consumers
    @property
    def rows(self)->int: return self.producer.weight[0].numel()
    @property
    def cols(self)->int: return sum(self.shapes[j].numel() for j in range(len(self.shapes)))
    @property
    def weight(self)->torch.Tensor: return self.producer.weight
    @property
    def shapes(self)->list:
        "Per reader: shape of one neuron's outgoing weights, `(d_out, spread, ...)`."
        return [torch.Size((c.weight.shape[0], r.spread, *c.weight.shape[2:])) for c,r in zip(self.consumers,self.site.readers)]

#| export
def incoming_weight(m, U):
    "Directions `(k, rows)` in the layout of the producer's weight."
    return U.view(-1, *m.weight.shape[1:])

def outgoing_weights(m, V):
    "Directions `(k, cols)` in the layout of each reader's weight, `(d_out, k*spread, ...)`."
    parts = V.split([s.numel() for s in m.shapes], 1)
    return [p.reshape(-1,*s).transpose(0,1).flatten(1,2) for p,s in zip(parts,m.shapes)]

#| export
def outgoing_directions(m, weights):
    "The inverse of `outgoing_weights`: `(k, cols)`."
    return torch.cat([w.unflatten(1,(-1,s[1])).transpose(0,1).flatten(1) for w,s in zip(weights,m.shapes)], 1)

#| export
def existing_incoming(m):
    "Incoming weights of the present neurons, `(width, rows)`."
    return m.weight.detach().flatten(1)

def existing_outgoing(m):
    "Outgoing weights of the present neurons, `(width, cols)`."
    return outgoing_directions(m, [c.weight.detach() for c in m.consumers])

#| export
def _local(m):
    "True where the path is pointwise, apart from a flatten."
    return all(s.local or s.fn is torch.flatten or isinstance(m.site.model.get_submodule(s.layer) if s.layer else None, nn.Flatten) for s in m.site.path)

def _base(m, z):
    "The constant output of new neurons in the producer, shaped like `z`."
    return torch.full_like(z, m.point.bias + m.point.lifts.get(m.site.name, 0.))

#| export
def _path(m, z, buds):
    "What the readers see of new neurons, padded as the readers pad."
    return tuple(_pad(c,a) for c,a in zip(m.consumers, run_path(m.site, z, buds, m.point.lifts)))

#| export
def path_slopes(m)->list:
    "Derivative of a pointwise path, one number per reader."
    z = _base(m, m.weight.new_zeros((1,)*(m.weight.dim() if m.weight.dim()>2 else 2))).requires_grad_()
    with torch.enable_grad(): out = run_path(m.site, z, zero_buds(m.site,1,m.point), m.point.lifts)
    return [_gradient(a.sum(), z).item() for a in out]

def _channels(m, z): return z.shape[1] if isinstance(m.producer, _ConvNd) else z.shape[-1]

#| export
def push(
    m:Measurement, # Site
    z:torch.Tensor # Change of the producer's output, `(n, k, ...)`
)->list:           # Per reader, padded
    "Derivative of the path along `z`."
    if m.local:
        out = [z*s for s in m.slopes]
        return [_pad(c, a.flatten(1) if isinstance(c, nn.Linear) and isinstance(m.producer, _ConvNd) else a) for c,a in zip(m.consumers,out)]
    buds = zero_buds(m.site, _channels(m,z), m.point)
    return list(torch.func.jvp(lambda t: _path(m,t,buds), (_base(m,z),), (z,))[1])

#| export
def pull(
    m:Measurement, # Site
    gs:list,       # Per reader: gradient at its padded input
    shape:tuple    # Of the producer's output for these neurons
)->torch.Tensor:
    "Transposed derivative of the path: gradient at the producer's output."
    if m.local and not any(_pads_itself(c) for c in m.consumers): return sum(g.reshape(shape)*s for g,s in zip(gs,m.slopes))
    buds = zero_buds(m.site, shape[1] if isinstance(m.producer,_ConvNd) else shape[-1], m.point)
    with torch.enable_grad():
        z = _base(m, gs[0].new_zeros(shape)).requires_grad_()
        return torch.autograd.grad(_path(m,z,buds), z, gs, create_graph=any(g.requires_grad for g in gs))[0]

#| export
def _z_shape(m, x, k):
    "Shape of the producer's output for `k` neurons."
    if isinstance(m.producer, nn.Linear): return (*x.shape[:-1], k)
    p,(stride,padding,dilation) = m.producer,_geometry(m.producer)
    padding = (padding,)*len(p.kernel_size) if isinstance(padding, int) else padding
    return (len(x), k, *((s+2*q-d*(f-1)-1)//t+1 for s,q,d,f,t in zip(x.shape[2:],padding,dilation,p.kernel_size,stride)))

#| export
def _reader_shape(c, seen, k, spread):
    "Shape of a reader's padded input for `k` new neurons."
    return None if isinstance(c, nn.Linear) else (lambda s: (s[0],k*spread,*s[2:]))(_pad(c, seen[:,:1]).shape)

#| export
def positions(m)->int:
    "Positions per sample at which the producer works."
    shape = _z_shape(m, m.batches[0].x[:1], 1)
    return torch.Size(shape).numel()

#| export
def _reader_gradients(m, b, V):
    "Gradients at the readers' inputs for new neurons with outgoing directions `V`."
    return [input_gradient(c, _reader_shape(c,seen,len(V),r.spread), w, d) for c,r,w,d,seen in zip(m.consumers,m.site.readers,outgoing_weights(m,V),b.deltas,b.inputs)]

#| export
def gradient_in(
    m:Measurement, # Site
    V:torch.Tensor # Outgoing directions, `(k, cols)`
)->torch.Tensor:   # `(k, rows)`
    "M V: gradient of new incoming weights, at zero, when the outgoing ones are `V`."
    total = 0.
    for b in m.batches:
        gz = pull(m, _reader_gradients(m,b,V), _z_shape(m,b.x,len(V)))
        total = total + weight_gradient(m.producer, b.x, gz).flatten(1)
    return total

#| export
def gradient_out(
    m:Measurement, # Site
    U:torch.Tensor # Incoming directions, `(k, rows)`
)->torch.Tensor:   # `(k, cols)`
    "M' U: what the outgoing weights' gradient would be, were the path linear, when the incoming ones are `U`."
    total = 0.
    for b in m.batches:
        a = push(m, apply_layer(m.producer, b.x, incoming_weight(m,U)))
        total = total + outgoing_directions(m, [weight_gradient(c,t,d) for c,t,d in zip(m.consumers,a,b.deltas)])
    return total

#| export
def _loss_with(model, sites, pairs, loss_func, shares, extra):
    "Differentiable mean loss with neurons added."
    with torch.enable_grad(), recording(sites, extra): return sum(s*_loss(model, *p, loss_func) for p,s in zip(pairs,shares))

def _seed(site): return (zlib.crc32(site.name.encode()) + 1000003*site.width + torch.initial_seed() + int(torch.randint(2**31,()))) % 2**62

#| export
def measure(
    model:nn.Module,      # Model
    sites:list,           # Sites found on it
    batch,                # `(xb, yb)` or an iterable of such pairs; gradients are averaged over all samples
    loss_func,            # Loss, `loss_func(model(xb), yb)`: a mean over the batch
    lr:float=None         # Learning rate of the optimizer, for length rules that ask for it
)->list:                  # One `Measurement` per site
    "Measure all `sites` in one forward and backward pass per batch, without a trace."
    model = getattr(model, '_orig_mod', model) # what torch.compile wraps
    sites = [s.on(model) for s in sites]
    with untouched(model), torch.autocast(_device(model).type, enabled=False):
        pairs = as_batches(batch)
        return _measure(model, sites, pairs, loss_func, lr, [_seed(s) for s in sites])

def _device(model): return next(model.parameters()).device

#| export
def _measure(model, sites, pairs, loss_func, lr, seeds):
    sizes = [samples_in(xb) for xb,_ in pairs]
    shares = [n/sum(sizes) for n in sizes]
    def run(extra=None, only=sites):
        with untouched(model):
            runs = [_capture(model, only, p, loss_func, extra, share) for p,share in zip(pairs,shares)]
            return sum(s*l for (l,_),s in zip(runs,shares)), [list(c) for c in zip(*(c for _,c in runs))]
    def loss_with(extra, only):
        with untouched(model): return _loss_with(model, only, pairs, loss_func, shares, extra)
    loss,captured = run()
    again = lambda s: lambda extra: (lambda loss,captured: (loss.item(),captured[0]))(*run(extra,[s]))
    virtual = lambda s: lambda extra: loss_with(extra,[s])
    return [Measurement(s, c, loss.item(), again(s), virtual(s), lr, seed) for s,c,seed in zip(sites,captured,seeds)]

#| export
def top_singular(
    forward,            # `V (b, cols) -> (b, rows)`: M V
    backward,           # `U (b, rows) -> (b, cols)`: M' U
    start:torch.Tensor, # First block of the incoming side, orthonormal rows `(b, rows)`
    k:int,              # Number of singular triples, at most `b`
    tol:float=.03,      # Stop when the sum of the k largest squares grew by less than this fraction in one iteration; what is left is about a tenth of it
    max_iter:int=6      # And at the latest here
)->tuple:               # `sigma (k,)`, `U (k, rows)`, `V (k, cols)`, with M V = sigma U exactly
    "Leading singular triples of a matrix that is only known by its products."
    Q,Y,block,value = start.new_zeros(0,0),start.new_zeros(0,start.shape[1]),start,None
    for _ in range(max_iter):
        w = backward(block)
        old = _squares_of(w,k) if value is None else value
        q = _orthonormal(w, Q)
        y = forward(q)
        Q,Y = torch.cat([Q.view(-1,q.shape[1]),q]),torch.cat([Y,y])
        value = _squares_of(Y, k)
        if value-old <= tol*value or len(Q)+len(q)>min(Q.shape[1],Y.shape[1]): break
        block = _orthonormal(y, None)
    R = torch.linalg.eigh(_gram(Y))[1].flip(1)[:,:k].T.to(Y)
    MV = R@Y
    sigma = MV.norm(dim=1)
    return sigma, MV/sigma.clamp_min(torch.finfo(sigma.dtype).tiny)[:,None], R@Q

#| export
def _gram(t): return (t@t.T).double()

def _squares_of(t, k):
    "Sum of the `k` largest squared singular values of `t`."
    return torch.linalg.eigvalsh(_gram(t))[-k:].sum().item()

#| export
def _orthonormal(t, against):
    "Orthonormal basis of the rows of `t`, orthogonal to `against`."
    if against is None or not len(against): return torch.linalg.qr(t.T)[0].T
    for _ in range(2): t = torch.linalg.qr((t - (t@against.T)@against).T)[0].T # twice is enough for orthogonality to rounding
    return t

#| export
def _patches(m, x):
    "The producer's input as its kernel sees it: `(n, rows, ...)` at the producer's output positions, or `(..., rows)`."
    p = m.producer
    if isinstance(p, nn.Linear): return x
    stride,padding,dilation = _geometry(p)
    padding = (padding,)*len(p.kernel_size) if isinstance(padding, int) else padding
    x,size = F.pad(x, [q for q in reversed(padding) for _ in (0,1)]),_z_shape(m,x,1)[2:]
    offsets = torch.cartesian_prod(*(torch.arange(f) for f in p.kernel_size)).view(-1,len(p.kernel_size)).tolist()
    cut = lambda o: x[(slice(None),slice(None),*(slice(i*d, i*d+(n-1)*s+1, s) for i,d,n,s in zip(o,dilation,size,stride)))]
    return torch.stack([cut(o) for o in offsets], 2).flatten(1,2)

#| export
def _axes(m, c):
    "Per axis: producer and reader geometry `(k1, s1, p1, d1, k2, s2, p2, d2)`."
    (s1,p1,d1),(s2,p2,d2) = _geometry(m.producer),_geometry(c)
    wide = lambda t,n: (t,)*n if isinstance(t, int) else t
    n = len(c.kernel_size)
    return list(zip(m.producer.kernel_size, s1, wide(p1,n), d1, c.kernel_size, s2, wide(p2,n), d2))

#| export
def _outside(axis, size, hidden, out):
    "Triples `(u, v, q)` along one axis whose hidden position is outside the map though their input position is inside."
    k1,s1,p1,d1,k2,s2,p2,d2 = axis
    r = lambda v,q: s2*q+d2*v-p2
    return [(u,v,q) for v in range(k2) for q in range(out) if not 0<=r(v,q)<hidden for u in range(k1) if 0<=s1*r(v,q)+d1*u-p1<size]

#| export
def _corners(m):
    "Per reader and axis the triples of `_outside`, or None where the growth matrix is no correlation."
    convs = isinstance(m.producer,_ConvNd) and all(isinstance(c,_ConvNd) and not _pads_itself(c) for c in m.consumers)
    if not convs or not m.local: return None
    b = m.batches[0]
    hidden = _z_shape(m, b.x[:1], 1)[2:]
    found = [[_outside(a,*sizes) for a,*sizes in zip(_axes(m,c), b.x.shape[2:], hidden, d.shape[2:])] for c,d in zip(m.consumers,b.deltas)]
    return found if all(len(t)<=4 for axes in found for t in axes) else None # many of them, large kernels: products are cheaper

#| export
def _correlate(m, b):
    "The growth matrix of two convolutions with only activations in between, for one batch."
    parts = []
    for c,delta,triples,slope in zip(m.consumers,b.deltas,_corners(m),m.slopes):
        axes = _axes(m, c)
        offsets = [torch.tensor([[s1*d2*v+d1*u for v in range(k2)] for u in range(k1)]) for k1,s1,_,d1,k2,_,_,d2 in axes]
        x = _aligned(b.x, delta, axes, offsets)
        M = x.new_zeros(delta.shape[1], x.shape[1], *(n for o in offsets for n in o.shape))
        for fixed in itertools.product(*([None,*t] for t in triples)): _add_correlation(M, x, delta, axes, offsets, fixed)
        n = len(axes)
        M = M.permute(1, *range(2,2+2*n,2), 0, *range(3,3+2*n,2)).reshape(m.rows, -1)
        parts.append(M*slope)
    return torch.cat(parts, 1)

#| export
def _aligned(x, delta, axes, offsets):
    "`x` padded and cut so that output position q and offset o meet input position s1 s2 q + o."
    pads = [(s1*p2+p1, s1*s2*(q-1)+o.max().item()+1-(s1*p2+p1)-size) for (_,s1,p1,_,_,s2,p2,_),o,q,size in zip(axes,offsets,delta.shape[2:],x.shape[2:])]
    return F.pad(x, [p for pair in reversed(pads) for p in pair])

#| export
def _add_correlation(M, x, delta, axes, offsets, fixed):
    "Add to `M` the correlation with the axes in `fixed` held at their triple; its sign alternates with their number."
    strides,where = [],[slice(None),slice(None)]
    for i,((_,s1,_,_,_,s2,_,_),o,t) in enumerate(zip(axes,offsets,fixed)):
        strides.append(s1*s2 if t is None else 1)
        where += [slice(None)]*2 if t is None else list(t[:2])
        if t is not None: x,delta = x.narrow(i+2, s1*s2*t[2]+o[t[0],t[1]].item(), 1),delta.narrow(i+2, t[2], 1)
    size = [1 if t is not None else o.max().item()+1 for o,t in zip(offsets,fixed)]
    grad = {1:nn.grad.conv1d_weight, 2:nn.grad.conv2d_weight, 3:nn.grad.conv3d_weight}[len(axes)]
    A = grad(x, (delta.shape[1],x.shape[1],*size), delta, strides, 0, 1)
    for i,(o,t) in reversed(list(enumerate(zip(offsets,fixed)))):
        A = A.select(i+2,0) if t is not None else A.index_select(i+2, o.flatten().to(A.device)).unflatten(i+2, o.shape)
    M[tuple(where)] += (-1)**sum(t is not None for t in fixed)*A

#| export
def growth_matrix_of(
    m:Measurement # Site
)->torch.Tensor:  # `(rows, cols)`
    "The whole growth matrix, exact for every kind of site."
    if _corners(m) is not None: return sum(_correlate(m, b) for b in m.batches)
    if m.cols<=m.rows and not isinstance(m.producer, nn.Linear): return gradient_in(m, torch.eye(m.cols).to(m.weight)).T
    total = 0.
    for b in m.batches:
        for part in _parts(m, b):
            a = push(m, _patches(m,part.x))
            total = total + outgoing_directions(m, [weight_gradient(c,t,d) for c,t,d in zip(m.consumers,a,part.deltas)])
    return total

#| export
def _parts(m, b):
    "Split a batch so that its patches stay small in memory. BatchNorm couples samples, so then it stays whole."
    size = len(b.x) if not m.local else max(1, 2**24//(m.rows*max(1,b.x[0,:1].numel())))
    return [Captured(*t) for t in zip(b.x.split(size), zip(*(d.split(size) for d in b.deltas)), [None]*len(b.x))] if isinstance(m.producer,_ConvNd) else [b]

#| export
def _dense_is_cheaper(m, block):
    "Compare multiplications per sample: the whole matrix against about three iterations of the block method."
    product = 4*block*(m.rows+m.cols)
    if min(m.rows,m.cols)<=2*block: return True
    if _corners(m) is not None:
        taps = max(torch.Size(s1*d2*(k2-1)+d1*(k1-1)+1 for k1,s1,_,d1,k2,_,_,d2 in _axes(m,c)).numel() for c in m.consumers)
        return m.batches[0].x.shape[1]*sum(c.weight.shape[0] for c in m.consumers)*taps <= 3*product
    return (m.rows*m.cols if isinstance(m.producer, nn.Linear) else min(m.rows,m.cols)*(m.rows+m.cols)) <= product

#| export
def _couples(m):
    "True where the path makes samples depend on each other."
    return any(isinstance(m.site.model.get_submodule(n),_NormBase) for n in _starts(m.site)[1:])

#| export
def fewer(
    m:Measurement, # Site
    n:int          # Samples wanted
)->Measurement:
    "The same measurement seen through the first `n` samples of its first batch; whole where samples depend on each other."
    b = m.batches[0]
    if _couples(m) or n>=len(b.x): return m
    part = replace(m, batches=[Captured(b.x[:n], [d[:n] for d in b.deltas], [t[:n] for t in b.inputs])])
    part.__dict__.update({n:v for n,v in m.__dict__.items() if n in ('point','slopes')}) # neither depends on the batch
    return part

#| export
def _first_block(m, block, k, whiten):
    "Orthonormal incoming directions to start from: random, or the leading ones of an eighth of the batch."
    g = torch.Generator().manual_seed(m.seed)
    start = _orthonormal(torch.randn(block, m.rows, generator=g).to(m.weight), None)
    if not isinstance(m.producer,_ConvNd) or len(m.batches[0].x)<32: return start
    part = fewer(m, len(m.batches[0].x)//8)
    if part is m: return start
    return top_singular(lambda V: whiten(gradient_in(part,V)), lambda U: gradient_out(part,whiten(U)), start, block, tol=.1, max_iter=3)[1]

#| export
def _decompose(M, k, seed):
    "Leading triples of a matrix at hand; iterated to rounding where a full decomposition would cost more than the training step."
    if min(M.shape)<=192:
        U,sigma,Vh = torch.linalg.svd(M, full_matrices=False)
        return sigma[:k],U[:,:k].T,Vh[:k]
    start = torch.randn(min(k+16,*M.shape), len(M), generator=torch.Generator().manual_seed(seed)).to(M)
    return top_singular(lambda V: V@M.T, lambda U: U@M, _orthonormal(start,None), k, tol=10*torch.finfo(M.dtype).eps, max_iter=60)

#| export
def leading_directions(
    m:Measurement,          # Site
    k:int,                  # Number of triples, at most `min(rows, cols)`
    metric:torch.Tensor=None# Symmetric `(rows, rows)` matrix W; then the triples are those of W M
)->tuple:                   # `sigma (k,)`, `U (k, rows)`, `V (k, cols)`, best first
    "The `k` leading singular triples of the growth matrix, whatever their size."
    block = min(-(-k//16)*16, m.rows, m.cols)
    whiten = (lambda t: t) if metric is None else (lambda t: t@metric)
    if _dense_is_cheaper(m, block): return _decompose(whiten(growth_matrix_of(m).T).T, k, m.seed)
    return top_singular(lambda V: whiten(gradient_in(m,V)), lambda U: gradient_out(m,whiten(U)), _first_block(m,block,k,whiten), k)

#| export
def top_directions_of(
    m:Measurement, # Site
    k:int          # Number of neurons
)->tuple:          # `sigma (k,)`, `U (k, rows)`, `V (k, cols)`, best first
    "The `k` leading singular triples of the growth matrix; raises `ValueError` where they carry no gradient."
    if k>min(m.rows,m.cols): raise ValueError(f"`{m.site.name}`: {k} neurons were asked for, but its growth matrix is {m.rows}x{m.cols} and has at most {min(m.rows,m.cols)} directions; ask for fewer per event")
    sigma,U,V = leading_directions(m, k)
    rank = rank_of(m, sigma)
    if rank<k: raise ValueError(f"`{m.site.name}`: {k} neurons were asked for, but the growth matrix of this batch has rank {rank}; ask for at most {rank} or give a larger growth batch")
    return sigma, U, V

#| export
def rank_of(
    m:Measurement,     # Site
    sigma:torch.Tensor # Leading singular values, best first
)->int:
    "How many of `sigma` carry a gradient; raises `ValueError` if none does."
    if not torch.isfinite(sigma).all(): raise ValueError(f"`{m.site.name}`: the growth matrix is not finite; check the loss and the inputs")
    if sigma[0]==0: raise ValueError(f"`{m.site.name}`: the growth matrix is zero, so no direction is better than another: the gradient vanishes on this batch (a perfect fit, or dead neurons); use another batch or `RandomGrowth`")
    return int((sigma > sigma[0]*max(1e-7, torch.finfo(sigma.dtype).eps*max(m.rows,m.cols))).sum())

#| export
def _producer_bias_gradient(m, V):
    "Gradient of the new neurons' biases in the producer, `(k,)`: the growth matrix applied to an input that is always 1."
    if m.producer.bias is None: return V.new_zeros(len(V))
    ones = [push(m, b.x.new_ones(_z_shape(m,b.x,1))) for b in m.batches]
    c = sum(outgoing_directions(m, [weight_gradient(c,t,d) for c,t,d in zip(m.consumers,a,b.deltas)]) for a,b in zip(ones,m.batches))
    return V@c[0]

#| export
def _bud_bias_gradients(m, V, buds):
    "Gradients of the biases of the path's layers, by layer name."
    names = [n for n,b in buds.items() if getattr(b,'bias',None) is not None]
    total = {n:0. for n in names}
    for n in names: buds[n].bias.requires_grad_()
    for b in m.batches if names else []:
        gs = _reader_gradients(m, b, V)
        with torch.enable_grad(): out = _path(m, _base(m, b.x.new_zeros(_z_shape(m,b.x,len(V)))), buds)
        for n,d in zip(names, torch.autograd.grad(out, [buds[n].bias for n in names], gs)): total[n] = total[n] + d.detach()
    for n in names: buds[n].bias.requires_grad_(False)
    return total

#| export
def _vector(t, like, conv): return t.view(*(-1 if i==(1 if conv else like.dim()-1) else 1 for i in range(like.dim())))

def _delivered(m, V, b, z, gb, step):
    "First-order change of the loss, per neuron, when the producer's new outputs change by `z`."
    buds,still = zero_buds(m.site,len(V),m.point),zero_buds(m.site,len(V),m.point)
    for n,d in gb.items(): buds[n].bias = nn.Parameter(buds[n].bias - d*step.detach().repeat_interleave(len(d)//len(V)), requires_grad=False)
    base = _base(m, z)
    moved = [new-old for new,old in zip(_path(m,base+z,buds), _path(m, base if _couples(m) else base[:1], still))]
    grads = outgoing_directions(m, [weight_gradient(c,t,d) for c,t,d in zip(m.consumers,moved,b.deltas)])
    return (grads*V).sum(1)

#| export
def gain(
    m:Measurement,      # Site
    V:torch.Tensor,     # Outgoing directions `(k, cols)`, unit length
    G:torch.Tensor=None # M V, where it is known already
)->torch.Tensor:        # `(2, k)`: for `V` and for `-V`
    "How fast the loss falls along the first step of each new neuron through the real path, for both signs."
    conv,size = isinstance(m.producer,_ConvNd),1. if _couples(m) else 1e-3
    g = gradient_in(m,V) if G is None else G
    gz,gb = _producer_bias_gradient(m,V),_bud_bias_gradients(m, V, zero_buds(m.site,len(V),m.point))
    z = [apply_layer(m.producer, b.x, incoming_weight(m,-g)) for b in m.batches]
    if m.producer.bias is not None: z = [t - _vector(gz,t,conv) for t in z]
    rms = sum(t.square().transpose(1 if conv else -1,0).flatten(1).mean(1) for t in z).div(len(z)).sqrt().clamp_min(1e-30)
    step = size/rms
    fall = lambda s: -sum(_delivered(m, s*V, b, s*t*_vector(step,t,conv), {n:s*d for n,d in gb.items()}, step) for b,t in zip(m.batches,z))
    return torch.stack([fall(1.),fall(-1.)])/step/g.norm(dim=1).clamp_min(1e-30)

#| export
def settle(
    m:Measurement, # Site
    U:torch.Tensor,# Incoming weights, `(k, rows)`
    buds:dict      # Layers of the path for these neurons; their running statistics are set
)->dict:           # The same buds
    "Give fresh norms the statistics of the first growth batch, so that evaluation mode sees what training mode saw."
    norms = {n for n,b in buds.items() if isinstance(b,_NormBase) and b.running_mean is not None}
    def record(name):
        def f(x, out):
            b,t = buds[name],x.transpose(0,1).flatten(1)
            b.running_mean,b.running_var = t.mean(1),t.var(1, unbiased=False)
            return apply_bud(b, x)
        return f
    with torch.no_grad():
        b = m.batches[0]
        if norms: run_path(m.site, apply_layer(m.producer,b.x,incoming_weight(m,U)), buds, cuts={n:record(n) for n in norms})
    return buds

#| export
@dataclass
class Activity:
    "What neurons with given incoming weights would do."
    gradient:torch.Tensor # Gradient of their outgoing weights, `(k, cols)`
    rms:torch.Tensor      # Root mean square of their activations at the readers, `(k,)`

#| export
def activity(
    m:Measurement, # Site
    U:torch.Tensor # Incoming weights, `(k, rows)`
)->Activity:
    "Run neurons with incoming weights `U` through the real path."
    buds,grads,squares,count = settle(m,U,make_buds(m.site,len(U))),0.,0.,0
    for b in m.batches:
        a = run_path(m.site, apply_layer(m.producer,b.x,incoming_weight(m,U)), buds)
        grads = grads + outgoing_directions(m, [weight_gradient(c,_pad(c,t),d) for c,t,d in zip(m.consumers,a,b.deltas)])
        squares,count = squares + sum(_squares(m,j,t) for j,t in enumerate(a)), count + sum(t.numel() for t in a)/len(U)
    return Activity(grads, (squares/count).sqrt())

#| export
def _squares(m, j, a):
    "Sum of squares per neuron of the values a reader receives."
    c,spread = m.consumers[j],m.site.readers[j].spread
    return a.square().flatten(0,-2).sum(0).unflatten(0,(-1,spread)).sum(1) if isinstance(c,nn.Linear) else a.square().transpose(0,1).flatten(1).sum(1)

#| export
def existing_rms(
    m:Measurement # Site
)->float:
    "Mean over the existing neurons of the root mean square of their activations."
    squares = sum(_squares(m,j,t) for b in m.batches for j,t in enumerate(b.inputs))
    return (squares/(sum(t.numel() for b in m.batches for t in b.inputs)/m.site.width)).sqrt().mean().item()

#| export
def input_energy(
    m:Measurement,  # Site
    limit:int=16384 # Most patches used; more make the estimate sharper and slower
)->torch.Tensor:    # `(rows, rows)`
    "Second moment of the producer's input patches, S = E[h h']."
    total,count,each = 0.,0,max(1, limit//len(m.batches))
    for b in m.batches:
        h = _patches(m, b.x[:max(1, each//max(1,b.x[0,:1].numel()))*2])
        h = h.transpose(1,-1).reshape(-1,m.rows) if isinstance(m.producer,_ConvNd) else h.reshape(-1,m.rows)
        h = h[:: max(1, len(h)//each)]
        total,count = total + h.T@h, count+len(h)
    return total/count

#| export
def adding(
    m:Measurement,      # Site
    U:torch.Tensor,     # Incoming weights, `(k, rows)`
    V:torch.Tensor,     # Outgoing weights, `(k, cols)`
    zero_incoming:bool  # Whether the path is set up for neurons that start at zero
):
    "A function for `recording` that adds these neurons' contribution to every reader's output."
    point = m.point if zero_incoming else OperatingPoint()
    buds = zero_buds(m.site,len(U),point) if zero_incoming else settle(m,U,make_buds(m.site,len(U)))
    def extra(site, j, x):
        z = apply_layer(site.producer, _pad(site.producer,x), incoming_weight(m,U))
        base = torch.full_like(z, point.bias + point.lifts.get(site.name,0.))
        read = lambda z: _pad(site.consumers[j], run_path(site,z,buds,point.lifts)[j])
        a = read(base+z)-read(base) if zero_incoming else read(z) # their constant is taken out of the reader's bias
        return apply_layer(site.consumers[j], a, outgoing_weights(m,V)[j])
    return extra

#| export
def loss_with(
    m:Measurement,      # Site
    U:torch.Tensor,     # Incoming weights, `(k, rows)`; may require a gradient
    V:torch.Tensor,     # Outgoing weights, `(k, cols)`; likewise
    zero_incoming:bool  # Whether the path is set up for neurons that start at zero
)->torch.Tensor:
    "The growth batch's loss with candidate neurons in place, differentiable."
    return m.virtual_loss(adding(m,U,V,zero_incoming))

#| export
def with_neurons(m, U, V):
    "The measurement as it would be with candidate neurons in place."
    loss,batches = m.rerun(adding(m, U, V, True))
    return Measurement(m.site, batches, loss, m.rerun, m.virtual_loss, m.lr, m.seed+1)
