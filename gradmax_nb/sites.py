#| export
import operator
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from gradmax_nb.surgery import append_channels, append_inputs, append_outputs, bud

#| export
@dataclass(frozen=True)
class Ref:
    "Stands for the result of step `index` of a path; 0 is the producer's output."
    index:int

@dataclass(frozen=True)
class Step:
    "One channel-wise operation of a path."
    name:str             # Name in the traced graph, for messages
    layer:str|None       # Qualified name of the module it applies, or None
    fn:object            # Function it applies, where `layer` is None
    args:tuple           # Arguments, with `Ref`s in place of earlier results
    kwargs:dict          # Keyword arguments, likewise
    local:bool=False     # Pointwise: the same function at every position and for every channel
    spread:int=1         # Features per channel in its input (H*W after a flatten)

@dataclass(frozen=True)
class Reader:
    "A consumer: the layer that reads the new neurons."
    name:str             # Qualified name
    source:Ref           # Where in the path it reads
    spread:int=1         # Input features per neuron: H*W behind a flatten, else 1

#| export
@dataclass(frozen=True)
class Site:
    "A place where a model can grow."
    name:str                                    # Qualified name of the producer
    path:tuple                                  # `Step`s from the producer to the readers
    readers:tuple                               # `Reader`s
    model:nn.Module=field(repr=False, compare=False) # The model it was found in

    @property
    def producer(self)->nn.Module: return self.model.get_submodule(self.name)
    @property
    def consumers(self)->list: return [self.model.get_submodule(r.name) for r in self.readers]
    @property
    def width(self)->int: return self.producer.weight.shape[0]
    @property
    def layers(self)->list: return [s.layer for s in self.path if s.layer]

    def on(self,
        model:nn.Module # The model it was found in, or a copy or reload of it
    ):
        "The same site on another copy of its model; raises `ValueError` if a layer is missing there."
        names = {n for n,_ in model.named_modules()}
        missing = [n for n in (self.name, *self.layers, *(r.name for r in self.readers)) if n not in names]
        if missing: raise ValueError(f"site `{self.name}` does not belong to this {type(model).__name__}: it has no layer `{missing[0]}`; call find_sites on this model")
        return self if self.model is model else replace(self, model=model)

#| export
@dataclass(frozen=True)
class Refusal:
    "A layer that cannot grow, with the reason and what to do about it."
    name:str   # Qualified name of the layer
    reason:str # Why not, and the remedy where there is one
    def __str__(self): return f'{self.name or "(the model itself)"}: {self.reason}'

class _Refused(Exception): pass

#| export
_pointwise_layers = {nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.Identity, nn.PReLU}
_dropouts = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout}
_spatial_layers = {nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.LPPool1d, nn.LPPool2d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d}

#| export
_math = 'relu tanh sigmoid exp sin cos erf square sqrt abs neg clamp clamp_min clamp_max maximum minimum where add sub mul div true_divide pow zeros_like ones_like ge gt le lt sign positive'.split()
_pointwise_functions = {getattr(torch,n) for n in _math} | {getattr(operator,n) for n in 'add sub mul truediv neg pow ge gt le lt iadd isub imul'.split()} | {F.relu, torch.relu_, F.relu6, F.leaky_relu,
    F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, torch.tanh, F.tanh, F.sigmoid, F.softplus, F.softsign, F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid, F.tanhshrink, F.softshrink, F.hardshrink, F.threshold}
_pointwise_methods = set(_math) | {'relu_','tanh_','sigmoid_','clamp_','contiguous','float','double','to','clone','detach','add_','mul_'} - {'where','detach'}
_spatial_functions = {F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.interpolate, F.pad}

#| export
def register_pointwise(
    *ops # Module types or functions that compute the same function of every element
):
    "Declare that `ops` act on each element by itself, so that sites may reach through them."
    for op in ops: (_pointwise_layers if isinstance(op, type) else _pointwise_functions).add(op)

#| export
@dataclass(frozen=True)
class _Spot:
    ref:Ref        # Step whose result this is
    axis:int       # Channel axis
    spread:int=1   # Features per channel along that axis

@dataclass
class _Operation:
    "One traced operation, as the rules see it."
    node:object    # Its fx node
    layer:object   # Its module, or None
    what:object    # Module type, function or method name
    spots:list     # Spots of the path tensors it reads
    shape:tuple    # Shape of its first path input
    out:object     # Shape of its result; None if that is no tensor

#| export
def _one_spot(o):
    "The common spot of all path inputs of an operation."
    if len({(s.axis,s.spread) for s in o.spots})>1: raise _Refused(f"`{o.node.name}` combines its channels in two different layouts")
    return o.spots[0]

def _is_dropout(o): return o.what in _dropouts

def _is_pointwise(o):
    if o.layer is not None: return type(o.layer) in _pointwise_layers
    return o.what in (_pointwise_methods if isinstance(o.what, str) else _pointwise_functions)

#| export
def _spatial(o):
    "Rule of operations that expect channels on axis 1 and work on the axes behind it."
    spot = _one_spot(o)
    if spot.axis!=1 or len(o.shape)<3 or spot.spread>1:
        raise _Refused(f"`{o.node.name}` works along axis 1 of a {len(o.shape)}-dimensional tensor, where this layer's neurons are not")
    return spot.axis,spot.spread

def _norm(o):
    "Rule of BatchNorm, InstanceNorm and PReLU: channels on axis 1, flattened or not."
    spot = _one_spot(o)
    if spot.axis!=1: raise _Refused(f"`{o.node.target}` ({type(o.layer).__name__}) has one parameter for each place along axis 1, where this layer's neurons are not")
    return spot.axis,spot.spread

#| export
def _reshape(o):
    "Rule of flatten, view and reshape: nothing, or everything behind axis 1 merged into it."
    spot = _one_spot(o)
    if tuple(o.out)==tuple(o.shape): return spot.axis,spot.spread
    if spot.axis==1 and len(o.out)==2 and o.out[0]==o.shape[0] and len(o.shape)>2:
        return 1, spot.spread*(o.out[1]//o.shape[1])
    raise _Refused(f"`{o.node.name}` reshapes {tuple(o.shape)} to {tuple(o.out)}, which does not keep each neuron's values together; flatten everything behind axis 1 instead")

#| export
def _dims(o):
    "The `dim` argument of a reduction or squeeze, as a set of non-negative axes."
    dims = o.node.kwargs.get('dim', o.node.args[1] if len(o.node.args)>1 else None)
    if isinstance(dims, int): dims = (dims,)
    if dims is None or not all(isinstance(d,int) for d in dims): raise _Refused(f"`{o.node.name}` reduces over all axes")
    return {d%len(o.shape) for d in dims}

def _mean(o):
    spot,dims = _one_spot(o),_dims(o)
    if spot.axis in dims: raise _Refused(f"`{o.node.name}` reduces over its neurons, so each one changes what the others give")
    keep = o.node.kwargs.get('keepdim', len(o.node.args)>2 and o.node.args[2])
    return spot.axis - (0 if keep else sum(d<spot.axis for d in dims)), spot.spread

#| export
def _permute(o):
    spot = _one_spot(o)
    axes = o.node.args[1:] if isinstance(o.node.args[1], int) else o.node.args[1]
    return [a%len(o.shape) for a in axes].index(spot.axis), spot.spread

def _transpose(o):
    spot = _one_spot(o)
    a,b = (d%len(o.shape) for d in o.node.args[1:3])
    return {a:b,b:a}.get(spot.axis, spot.axis), spot.spread

#| export
def _squeeze(o):
    spot,dims = _one_spot(o),_dims(o)
    if spot.axis in dims: raise _Refused(f"`{o.node.name}` removes the axis of its neurons")
    return spot.axis - sum(d<spot.axis and o.shape[d]==1 for d in dims), spot.spread

def _unsqueeze(o):
    spot,dim = _one_spot(o),o.node.kwargs.get('dim', o.node.args[-1])
    return spot.axis + (dim%(len(o.shape)+1)<=spot.axis), spot.spread

_reshapes = {torch.flatten, torch.reshape, nn.Flatten, 'flatten', 'view', 'reshape'}
_rules = {op:_mean for op in (torch.mean,'mean',torch.sum,'sum',torch.amax,'amax',torch.amin,'amin')} | {torch.unsqueeze:_unsqueeze, 'unsqueeze':_unsqueeze, torch.permute:_permute, 'permute':_permute, torch.transpose:_transpose, 'transpose':_transpose, torch.squeeze:_squeeze, 'squeeze':_squeeze}

#| export
_sums = {torch.add, operator.add, operator.iadd, 'add', 'add_', torch.sub, operator.sub, 'sub'}
_products = {torch.mul, operator.mul, operator.imul, 'mul', 'mul_', torch.div, operator.truediv, 'div'}
_joins = {torch.cat, torch.concat, torch.stack}
_splits = {torch.chunk, torch.split, torch.unbind, torch.tensor_split, 'chunk', 'split', 'unbind', 'tensor_split', F.glu}
_norms = {F.layer_norm, F.group_norm, F.local_response_norm, F.normalize}
_softmaxes = {F.softmax, torch.softmax, 'softmax', F.log_softmax, torch.log_softmax, 'log_softmax', nn.Softmax, nn.LogSoftmax, nn.Softmax2d}

def _mixture(o):
    "Why an operation with tensors from elsewhere ends the walk."
    if o.what in _sums: return f"feeds the addition `{o.node.name}` together with other channels (a residual stream): every writer and reader of that sum would have to grow at once; grow a layer inside the branch instead"
    if o.what in _products: return f"is multiplied in `{o.node.name}` by channels that come from elsewhere, which would have to grow at once; grow a layer inside one of the branches instead"
    if o.what in _joins: return f"is concatenated with other channels in `{o.node.name}`: its neurons would land in the middle of the consumer's inputs; grow a layer inside the branch instead"
    if o.what in _norms: return _unknown(o)
    return f"meets tensors from elsewhere in `{o.node.name}` ({_label(o.what)}), which its new neurons do not have"

#| export
def _label(what): return what if isinstance(what, str) else getattr(what, '__name__', str(what))

def _unknown(o):
    "Why an operation without a rule ends the walk."
    where = f"`{o.node.target}` ({type(o.layer).__name__})" if o.layer is not None else f"`{o.node.name}` ({_label(o.what)})"
    if isinstance(o.layer, (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)) or o.what in _norms: return f"feeds {where}, which normalises across channels: new ones would change the old ones' output; use BatchNorm, or grow a layer that does not feed it"
    if isinstance(o.layer, _ConvNd): return f"feeds the grouped convolution {where}, whose groups would be cut differently; grow a layer that does not feed it"
    if o.what in _softmaxes: return f"feeds {where}, which mixes its neurons"
    if o.what in _joins: return f"is concatenated in {where}: its neurons would land in the middle of the reader's inputs; grow a layer that does not feed it"
    if o.what in _splits: return f"is split in {where} by position: new neurons would move the cut; grow a layer that does not feed it"
    return f"feeds {where}, which is not known to treat each neuron by itself; if it does, declare it with `register_pointwise`"

#| export
def _depthwise(m): return isinstance(m, _ConvNd) and not m.transposed and m.groups==m.in_channels==m.out_channels

def _prelu(m): return isinstance(m, nn.PReLU) and m.num_parameters>1

def _taught(m): return m is not None and not isinstance(m, nn.PReLU) and bud.dispatch(type(m)) not in (bud.dispatch(object), bud.dispatch(_ConvNd))

def _has_channels(m): return isinstance(m, (_BatchNorm,_InstanceNorm)) or _depthwise(m) or _prelu(m)

def _position(o):
    "Axis and spread of the channels behind operation `o`."
    if isinstance(o.layer, (_BatchNorm,_InstanceNorm)) or _prelu(o.layer): return _norm(o)
    if _depthwise(o.layer) or _taught(o.layer): return _spatial(o)
    if _is_pointwise(o) or _is_dropout(o): return (lambda s: (s.axis,s.spread))(_one_spot(o))
    if o.what in _reshapes: return _reshape(o)
    if o.what in _rules: return _rules[o.what](o)
    if (o.layer is not None and type(o.layer) in _spatial_layers) or o.what in _spatial_functions: return _spatial(o)
    raise _Refused(_unknown(o))

#| export
class _Method:
    "Calls a tensor method by name; comparable and picklable, unlike a lambda."
    def __init__(self, name): self.name = name
    def __call__(self, x, *args, **kwargs): return getattr(x, self.name)(*args, **kwargs)
    def __eq__(self, other): return isinstance(other, _Method) and self.name==other.name
    def __hash__(self): return hash(self.name)

def _step(o, refs):
    "The step that repeats operation `o` on new channels."
    arg = lambda a: fx.node.map_arg(a, lambda n: refs[n] if n in refs else _const(o, n))
    fn = torch.flatten if o.what in _reshapes and o.layer is None else _Method(o.what) if isinstance(o.what, str) else o.what
    layer = o.node.target if o.layer is not None else None
    args,kwargs = ((arg(o.node.args[0]), 1),{}) if fn is torch.flatten else (arg(o.node.args), arg(o.node.kwargs))
    return Step(o.node.name, layer, None if layer else fn, tuple(args), dict(kwargs), _is_pointwise(o) and not _has_channels(o.layer), o.spots[0].spread)

def _const(o, n):
    raise _Refused(f"`{o.node.name}` depends on `{n.name}`, which is computed elsewhere")

#| export
class _Tracer(fx.Tracer):
    def is_leaf_module(self, m, name): return super().is_leaf_module(m, name) or _taught(m) or type(m) in _pointwise_layers

class _Shapes(fx.Interpreter):
    def run_node(self, n):
        out = super().run_node(n)
        n.meta['shape'] = tuple(out.shape) if isinstance(out, torch.Tensor) else None
        return out

#| export
def kept_buffers(
    model:nn.Module # Model that is about to run
)->list:
    "Every buffer of `model` with its place and a copy of its value, for `put_back`."
    return [(m._buffers,n,b,b.clone()) for m in model.modules() for n,b in m._buffers.items() if b is not None]

def put_back(
    buffers:list # From `kept_buffers`
):
    "Restore buffers that were changed in place or replaced."
    with torch.no_grad():
        for table,name,b,value in buffers: table[name] = b.copy_(value)

@contextmanager
def evaluating(
    model:nn.Module # Model to run without a trace
):
    "Evaluation mode without gradients; modes, buffers and torch's random state are restored afterwards."
    modes,buffers = [(m,m.training) for m in model.modules()],kept_buffers(model)
    model.eval()
    try:
        with torch.no_grad(), _own_draws(): yield model
    finally:
        for m,mode in modes: m.training = mode
        put_back(buffers)

def _own_draws(): return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else [])

def as_inputs(
    xb # Example input: a tensor, or a tuple or list of positional inputs
)->tuple:
    "The positional inputs of the model as a tuple."
    return tuple(xb) if isinstance(xb, (tuple,list)) else (xb,)

#| export
def _graphs(model):
    "Symbolic graphs of evaluation and training mode, those that can be recorded; if none can, the first error is raised."
    graphs,errors = [],[]
    for mode in (False,True):
        try: graphs.append(_Tracer().trace(model.train(mode)))
        except Exception as e: errors.append(e)
    model.eval()
    if not graphs: raise errors[0]
    return graphs

def _calls(graph): return {n.target for n in graph.nodes if n.op=='call_module'}

def _trace(model, xb):
    "The traced graph of `model` that calls most layers, with shapes."
    with evaluating(model):
        graph,*rest = _graphs(model)
        if rest and _calls(rest[0])>_calls(graph):
            try: return _with_shapes(model, rest[0], xb)
            except Exception: pass # an input too small for what only training calls
        return _with_shapes(model, graph, xb)

def _with_shapes(model, graph, xb):
    _Shapes(fx.GraphModule(model, graph)).run(*as_inputs(xb))
    return graph

#| export
def _said(e): return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"

def _untraced(model, xb, e):
    "What to say about every layer of a model that could not be traced because of `e`."
    try:
        with evaluating(model): model(*as_inputs(xb))
    except Exception as e: return f"the model could not be run with this input ({_said(e)}); give one example as the model gets it in training: a tensor, or a tuple of positional inputs"
    return f"the model runs, but cannot be traced ({_said(e)}); declare sites by hand with `declare_site`"

#| export
def _kind(m):
    "Why the type of `m` cannot be a producer or consumer, or None."
    name = type(m).__name__
    if 'quantized' in type(m).__module__ or 'qat' in type(m).__module__: return f"is quantized ({type(m).__module__}); grow the float model and quantize it afterwards"
    if isinstance(m, _ConvNd) and m.transposed: return f"is a {name}; transposed convolutions are not supported"
    if _depthwise(m) and m.groups>1: return "is a depthwise convolution: it grows together with the layer that feeds it"
    if isinstance(m, _ConvNd) and m.groups>1: return f"is a grouped convolution (groups={m.groups}): one more channel would cut its groups differently"
    if torch.nn.utils.parametrize.is_parametrized(m) or (type(m) in _growable and 'weight' not in m._parameters): return "has a parametrized weight; remove the parametrization before growing"
    if type(m) not in _growable: return f"is a {name}, which cannot be widened: only nn.Linear and nn.Conv1d/2d/3d themselves produce and read neurons"

_growable = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}

#| export
def _problems(model, graph):
    "Layer name -> why it cannot take part in growth by itself."
    calls = Counter(id(model.get_submodule(n.target)) for n in graph.nodes if n.op=='call_module')
    named = {n.target for n in graph.nodes if n.op=='call_module' and not n.args}
    owners = Counter(id(p) for m in {id(m):m for m in model.modules()}.values() for p in m._parameters.values() if p is not None)
    read = {n.target.rpartition('.')[0] for n in graph.nodes if n.op=='get_attr'}
    out = {}
    for name,m in model.named_modules(remove_duplicate=False):
        own = [p for p in m._parameters.values() if p is not None]
        if not name: out[name] = "is the whole model, whose width the task decides" if type(m) in _growable else f"{type(m).__name__} holds a parameter of its own, which no layer reads"
        elif _kind(m) and not _has_channels(m): out[name] = _kind(m)
        elif name in named: out[name] = "is called with keyword arguments only; pass its input by position"
        elif calls[id(m)]>1: out[name] = f"is used {calls[id(m)]} times in one forward pass; its neurons would have to serve every use"
        elif any(owners[id(p)]>1 for p in own): out[name] = "shares a parameter with another layer (tied weights); untie them before growing"
        elif own and name in read: out[name] = "has its weight read directly by the model's forward, not only by calling the layer"
    return out

#| export
def _consumes(o, problem):
    "Spread if operation `o` is a layer that reads the neurons, None if it is not; raises if it cannot be widened."
    if not isinstance(o.layer, (nn.Linear,_ConvNd)) or _depthwise(o.layer): return None
    if isinstance(o.layer, _ConvNd) and o.layer.groups>1: raise _Refused(_unknown(o))
    if problem: raise _Refused(f"feeds `{o.node.target}`, which {problem}")
    spot = _one_spot(o)
    axis = len(o.shape)-1 if isinstance(o.layer, nn.Linear) else 1
    if spot.axis!=axis or (spot.spread>1 and not isinstance(o.layer, nn.Linear)):
        raise _Refused(f"feeds `{o.node.target}` along axis {spot.axis}, while that layer mixes axis {axis}")
    return spot.spread

#| export
def _operation(model, n, spots):
    "View node `n` as an operation; `spots` holds the path tensors known so far."
    layer = model.get_submodule(n.target) if n.op=='call_module' else None
    inputs = [a for a in n.all_input_nodes if a in spots]
    return _Operation(n, layer, n.target if layer is None else type(layer), [spots[a] for a in inputs], inputs[0].meta['shape'], n.meta['shape'])

#| export
def _walk(model, start, problems):
    "The path and the readers of the producer at node `start`; raises `_Refused`."
    m,shape = model.get_submodule(start.target),start.meta['shape']
    if len(shape) < (m.weight.dim() if isinstance(m,_ConvNd) else 2): raise _Refused("gets an example without a batch dimension; pass a batch, `xb[None]`")
    axis = 1 if isinstance(m,_ConvNd) else len(shape)-1
    spots,path,readers = {start:_Spot(Ref(0), axis)},[],[]
    for n in start.graph.nodes:
        if not any(a in spots for a in n.all_input_nodes) or _is_shape_arithmetic(n): continue
        if n.op=='output': raise _Refused("is an output of the model, whose width the task decides; grow the layers before it")
        o = _operation(model, n, spots)
        if any(a not in spots and a.meta['shape'] not in (None,()) for a in n.all_input_nodes): raise _Refused(_mixture(o))
        spread = _consumes(o, problems.get(n.target) if o.layer is not None else None)
        if spread is not None: readers.append(Reader(n.target, o.spots[0].ref, spread))
        else: spots[n] = _follow(o, path, {m:s.ref for m,s in spots.items()}, problems)
    if not readers: raise _Refused("has no reader: its output is not used")
    return tuple(path),tuple(readers)

#| export
def _follow(o, path, refs, problems):
    "Append the step of operation `o` to `path`; return the spot of its result."
    if o.out is None and o.what in _splits: raise _Refused(_unknown(o))
    if o.out is None: raise _Refused(f"gives `{o.node.name}` something that is no tensor ({_label(o.what)}); its value would change with the width")
    if o.layer is not None and o.node.target in problems and _has_channels(o.layer): raise _Refused(f"passes `{o.node.target}`, which {problems[o.node.target]}")
    axis,spread = _position(o)
    if _is_dropout(o): return _Spot(o.spots[0].ref, axis, spread)
    path.append(_step(o, refs))
    return _Spot(Ref(len(path)), axis, spread)

#| export
def _is_shape_arithmetic(n):
    "True for `size`, `shape` and arithmetic on them that only ends in reshapes."
    return n.meta['shape'] is None and n.op!='output' and all(u.target in _reshapes or _is_shape_arithmetic(u) for u in n.users)

#| export
@dataclass(frozen=True)
class NewNeurons:
    "The weights of `k` new neurons at one site."
    incoming:torch.Tensor          # `(k, ...)` in the layout of the producer's weight
    outgoing:tuple                 # Per reader, in the layout of its weight: `(d_out, k, ...)`
    bias:torch.Tensor=None         # `(k,)` for the producer's bias; None means zeros
    buds:dict=field(default_factory=dict) # Layer name -> bud with `k` channels
    shifts:tuple=None              # Per reader, `(d_out,)` to add to its bias, or None

#| export
def make_buds(
    site:Site, # Where
    k:int      # Number of new neurons
)->dict:       # Layer name -> bud
    "Buds for every layer of the site's path that keeps something per channel."
    layers = {s.layer:(site.model.get_submodule(s.layer),s.spread) for s in site.path if s.layer}
    return {n:bud(m, k*spread) for n,(m,spread) in layers.items() if _has_channels(m) or _taught(m)}

#| export
def widen(
    site:Site,     # Where
    new:NewNeurons # What
)->list:           # Swaps: `(old, new)` parameters
    "Append new neurons to the model at `site`, in place."
    swaps = append_outputs(site.producer, new.incoming, new.bias)
    for name,b in new.buds.items(): swaps += append_channels(site.model.get_submodule(name), b)
    for i,(m,w) in enumerate(zip(site.consumers, new.outgoing)):
        swaps += append_inputs(m, w, new.shifts[i] if new.shifts else None)
    return swaps

#| export
def _outgoing_shape(m, k, spread):
    return (m.weight.shape[0], k*spread, *m.weight.shape[2:])

def _trial(site, k=2, scale=10.):
    "New neurons with large random incoming and zero outgoing weights."
    p,g = site.producer,torch.Generator().manual_seed(0)
    incoming = scale*torch.randn(k, *p.weight.shape[1:], generator=g).to(p.weight)
    outgoing = tuple(m.weight.new_zeros(_outgoing_shape(m,k,r.spread)) for m,r in zip(site.consumers,site.readers))
    return NewNeurons(incoming, outgoing, buds=make_buds(site,k))

#| export
def _tensors(out):
    "All tensors in a model's output, however nested."
    if isinstance(out, torch.Tensor): return [out]
    if isinstance(out, dict): out = list(out.values())
    elif hasattr(out, '__dataclass_fields__'): out = list(vars(out).values())
    return [t for o in out for t in _tensors(o)] if isinstance(out, (tuple,list)) else []

def _stand_in(model):
    "A copy of `model` in evaluation mode in which no parameter is all zeros."
    copy,g = deepcopy(model).eval(),torch.Generator().manual_seed(0)
    for p in copy.parameters():
        if p.dim() and not p.detach().any(): p.data = .1*torch.randn(p.shape, generator=g).to(p)
    return copy

#| export
def _run(model, xb):
    "The tensors of the model's output, with the same random draws every time."
    torch.manual_seed(0)
    return _tensors(model(*as_inputs(xb)))

@contextmanager
def _watching(sites):
    "Record, while the model runs, what each producer gives by itself (place 0) and what its readers get."
    seen = {s.name:{} for s in sites}
    def hook(s, i):
        def f(m, args): seen[s.name][i] = args[0].clone() if i else m.forward(*args)
        return f
    handles = [m.register_forward_pre_hook(hook(s,i)) for s in sites for i,m in enumerate((s.producer,*s.consumers))]
    try: yield seen
    finally:
        for h in handles: h.remove()

#| export
def apply_bud(
    m:nn.Module,   # Layer or bud
    x:torch.Tensor # Values of the new channels
)->torch.Tensor:
    "Forward of `m` without its hooks and without touching its running statistics."
    if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None): return F.batch_norm(x, None, None, m.weight, m.bias, True, 0., m.eps)
    if isinstance(m, _InstanceNorm) and (m.training or m.running_mean is None): return F.instance_norm(x, None, None, m.weight, m.bias, True, 0., m.eps)
    return m.forward(x)

#| export
def run_path(
    site:Site,      # Where
    z:torch.Tensor, # Outputs of the producer for `k` new neurons: `(n, k, ...)`, or `(..., k)` for a Linear
    buds:dict,      # Layer name -> bud with `k` channels, see `make_buds`; a layer without one is used itself
    lifts:dict=None,# Layer name -> constant added to that layer's output
    cuts:dict=None  # Layer name -> function of its input and output that gives what goes on instead
)->list:            # What each reader would receive from the new neurons
    "The channel-wise path between producer and readers, for new neurons only."
    lifts,cuts = lifts or {},cuts or {}
    values = [z.clone()] # a clone, because activations may work in place
    for s in site.path:
        args,kwargs = fx.node.map_aggregate((s.args,s.kwargs), lambda a: values[a.index] if isinstance(a, Ref) else a)
        m = None if s.layer is None else buds.get(s.layer) or site.model.get_submodule(s.layer)
        out = s.fn(*args,**kwargs) if m is None else apply_bud(m, *args, **kwargs)
        if s.layer in lifts: out = out + lifts[s.layer]
        values.append(cuts[s.layer](args[0], out) if s.layer in cuts else out)
    return [values[r.source.index] for r in site.readers]

#| export
def _differs(a, b): return a.shape!=b.shape or not _size(a.to(b)-b)<=_proof_tolerance*max(_size(b),1e-30)

def _size(t): return t.abs().max().item() if t.numel() and t.dtype!=torch.bool else float(t.any())

def _wrong_path(site, seen):
    "None if the path gives what every reader gets, else what is wrong."
    names = [r.name for r in site.readers]
    if 0 not in seen: return f"`{site.name}` is not called for this input"
    if len(seen)==1: return f"`{names[0]}` is not called for this input" # of several readers, some may be for training only
    try: values = run_path(site, seen[0], {})
    except Exception as e: return f"its path to {', '.join(f'`{n}`' for n in names)} failed: {_said(e)}"
    wrong = [n for i,(n,a) in enumerate(zip(names,values),1) if i in seen and _differs(a,seen[i])]
    if wrong: return f"`{wrong[0]}` gets something else than the path makes of `{site.name}`'s output: an operation, a hook or a layer in between is missing or wrong"

#| export
def _changed(before, after):
    "What growing changed, or None."
    for a,b in zip(before,after):
        if a.shape!=b.shape: return f"growing there changed an output's shape from {tuple(a.shape)} to {tuple(b.shape)}"
        if _differs(b.to(torch.float32) if b.dtype==torch.bool else b, a.to(torch.float32) if a.dtype==torch.bool else a):
            return f"growing there changed the model's output by {_size(b.to(a)-a):.1e} (its size is {_size(a):.1e}), so something else reads the new neurons"

def _incomparable(before):
    "Why nothing can be concluded from this output, or None."
    if not before: return "could not be checked: the model's output holds no tensor that could be compared"
    if not all(t.numel() for t in before): return "could not be checked: the model's output is empty; give at least one sample"
    if not all(torch.isfinite(t).all() for t in before): return "could not be checked: the model's output is not finite on this input"

#| export
def _unchanged(model, sites, xb):
    "None if the paths of `sites` are right and growing a copy there leaves its output alone, else what happened."
    try: copy = _stand_in(model)
    except Exception as e: return f"could not be checked, since the model cannot be copied ({_said(e)})"
    there = [s.on(copy) for s in sites]
    with torch.no_grad(), _own_draws():
        try:
            with _watching(there) as seen: before = _run(copy, xb)
        except Exception as e: return f"could not be checked: the model could not be run with this input ({_said(e)})"
        problem = next(filter(None, [_incomparable(before), *(_wrong_path(s,seen[s.name]) for s in there)]), None)
        if problem: return problem
        try:
            for s in there: widen(s, _trial(s))
            return _changed(before, _run(copy, xb))
        except Exception as e: return f"growing a copy of the model there failed: {_said(e)}"

_proof_tolerance = 1e-4 # relative; rounding of a deep float32 network stays well below, a forgotten reader of 10-sigma neurons well above

#| export
def check_site(
    model:nn.Module, # Model the site belongs to; it is copied, not touched
    site:Site,       # Found by `find_sites` or declared by hand
    xb               # Example input
)->Site:
    "Prove that `model` can grow at `site`: returns the site, or raises `ValueError` with what went wrong."
    problem = _unchanged(model, [site.on(model)], xb)
    if problem: raise ValueError(f"`{site.name}` is not a site: {problem}")
    return site

#| export
def _candidates(model):
    "Names of all layers with a weight that somebody might want to grow."
    return [n for n,m in model.named_modules() if any(p is not None and p.dim()>1 for p in m._parameters.values()) or _kind(m) and 'quantized' in _kind(m) or torch.nn.utils.parametrize.is_parametrized(m)]

def _uncalled(model, name):
    owner = name.rpartition('.')[0]
    inside = f"it is used inside `{owner}` ({type(model.get_submodule(owner)).__name__}), whose forward is not traced" if owner else "the forward pass does not call it"
    return f"is never called as a layer: {inside}; declare the site by hand with `declare_site` if its neurons are read by one layer"

#| export
def _prove(model, sites, xb):
    "Split `sites` into those that hold and refusals. All at once first, one by one only if that fails."
    if not sites or not _unchanged(model, sites, xb): return sites,[]
    checked = [(s,_unchanged(model,[s],xb)) for s in sites]
    return [s for s,p in checked if not p],[Refusal(s.name,p) for s,p in checked if p]

#| export
def find_sites(
    model:nn.Module, # Any module; it is not changed
    xb               # One example input: a tensor, or a tuple of positional inputs
)->tuple:            # `(sites, refused)`: lists of `Site` and `Refusal`, both in forward order
    "Find every place where `model` can grow and the reason for every layer that cannot."
    model = getattr(model, '_orig_mod', model) # what torch.compile wraps
    try: graph = _trace(model, xb)
    except Exception as e:
        reason = _untraced(model, xb, e)
        return [],[Refusal(n,reason) for n in _candidates(model)]
    problems,found,refused = _problems(model,graph),[],{}
    nodes = {n.target:n for n in graph.nodes if n.op=='call_module'}
    names = [n for n in nodes if n in set(_candidates(model))]
    for name in names + [n for n in _candidates(model) if n not in nodes]: _try(model, name, nodes, problems, found, refused)
    found,failed = _prove(model, found, xb)
    refused.update({r.name:r for r in failed})
    order = {n:i for i,n in enumerate(names)}
    return found, sorted(refused.values(), key=lambda r: order.get(r.name, len(order)))

#| export
def _try(model, name, nodes, problems, found, refused):
    "Add the layer `name` to `found` or to `refused`."
    try:
        if name in problems and not name or name not in nodes: raise _Refused(problems.get(name) or _uncalled(model,name))
        if name in problems or _kind(model.get_submodule(name)): raise _Refused(problems.get(name) or _kind(model.get_submodule(name)))
        found.append(Site(name, *_walk(model, nodes[name], problems), model))
    except _Refused as e: refused[name] = Refusal(name, str(e))

#| export
def _declared_step(model, i, p, width):
    "Step `i+1` of a declared path, which applies the layer name or function `p` to what `width` neurons have become."
    if not isinstance(p, str): return Step(_label(p), None, p, (Ref(i),1) if p is torch.flatten else (Ref(i),), {}, p in _pointwise_functions)
    layer = model.get_submodule(p)
    features = next((len(t) for t in (*layer.parameters(),*layer.buffers()) if t.dim()), width) if _has_channels(layer) else width
    return Step(p, p, None, (Ref(i),), {}, type(layer) in _pointwise_layers and not _has_channels(layer), features//width)

def _known(model, names):
    "Raise `ValueError` for a name that is no layer of `model`."
    layers = [n for n,_ in model.named_modules() if n]
    for n in names:
        if n not in layers: raise ValueError(f"{type(model).__name__} has no layer `{n}`; its layers are {', '.join(layers[:20])}{' ...' if len(layers)>20 else ''}")

#| export
def declare_site(
    model:nn.Module, # Model that `find_sites` cannot trace
    xb,              # Example input
    producer:str,    # Qualified name of the layer that gets new neurons
    *path            # Layer names and functions in order, last the name of the reader
)->Site:             # Proved with `check_site`
    "A site along one chain of layers and functions, declared by hand."
    if not path or not isinstance(path[-1], str): raise ValueError(f"declare_site needs the name of the layer that reads `{producer}`, as its last argument")
    _known(model, [producer, *(p for p in path if isinstance(p,str))])
    *between,reader = (p for p in path if not (isinstance(p,str) and type(model.get_submodule(p)) in _dropouts or p in _dropouts))
    for name in (producer,reader):
        if _kind(model.get_submodule(name)): raise ValueError(f"`{name}` {_kind(model.get_submodule(name))}")
    width = model.get_submodule(producer).weight.shape[0]
    readers = (Reader(reader, Ref(len(between)), model.get_submodule(reader).weight.shape[1]//width),)
    return check_site(model, Site(producer, tuple(_declared_step(model,i,p,width) for i,p in enumerate(between)), readers, model), xb)
