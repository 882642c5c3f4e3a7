#| export
from collections import Counter
from contextlib import contextmanager
from functools import singledispatch
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

#| export
def _memory_format(
    t:torch.Tensor # Any tensor
)->torch.memory_format:
    "The memory format in which `t` is laid out."
    formats = {4:torch.channels_last, 5:torch.channels_last_3d}
    fmt = formats.get(t.dim(), torch.contiguous_format)
    return fmt if not t.is_contiguous() and t.is_contiguous(memory_format=fmt) else torch.contiguous_format

#| export
def _append(old, new, dim):
    "`old` followed by `new` along `dim`; `new` is padded with zeros where it is shorter in another dimension."
    shape = list(old.shape)
    shape[dim] = new.shape[dim]
    if list(new.shape) != shape:
        padded = new.new_zeros(shape)
        padded[tuple(slice(s) for s in new.shape)] = new
        new = padded
    return torch.cat([old.detach(), new.detach().to(old)], dim).contiguous(memory_format=_memory_format(old))

#| export
def _swap(module, name, value):
    "Replace parameter `name` of `module`; return the `(old, new)` pair."
    old = module._parameters[name]
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    module._parameters[name] = new
    return old,new

#| export
@singledispatch
def sync_sizes(
    m:nn.Module # Layer whose parameters have been replaced
):
    "Set the size attributes of `m` from the shapes of its weights. Register a function per layer type."
    raise TypeError(f"{type(m).__name__} cannot be widened: no rule is registered for it; add one with `sync_sizes.register({type(m).__name__})`")

@sync_sizes.register
def _(m:nn.Linear): m.out_features,m.in_features = m.weight.shape

#| export
@sync_sizes.register
def _(m:_ConvNd):
    if m.transposed: raise TypeError(f"{type(m).__name__} cannot be widened: its weight is stored the other way round; growing transposed convolutions is not supported")
    m.out_channels = m.weight.shape[0]
    if m.groups>1: m.groups = m.weight.shape[0]
    m.in_channels = m.weight.shape[1]*m.groups

@sync_sizes.register
def _(m:_NormBase): m.num_features = next(t for t in (m.weight,m.running_mean) if t is not None).shape[0]

@sync_sizes.register
def _(m:nn.PReLU): m.num_parameters = m.weight.shape[0]

#| export
def append_outputs(
    m:nn.Module,            # Producer: `nn.Linear` or a convolution with one group
    weight:torch.Tensor,    # New incoming weights, `(k, ...)` in the layout of `m.weight`
    bias:torch.Tensor=None  # New biases `(k,)`; None means zeros where the layer has a bias
)->list:                    # Swaps: `(old, new)` parameters
    "Append `k` output neurons (or channels) to `m` in place."
    if getattr(m, 'groups', 1)>1: raise ValueError(f"cannot append outputs to a grouped {type(m).__name__}: {m}; grow a layer with groups=1")
    swaps = [_swap(m, 'weight', _append(m.weight, weight, 0))]
    if m.bias is not None:
        swaps.append(_swap(m, 'bias', _append(m.bias, m.bias.new_zeros(len(weight)) if bias is None else bias, 0)))
    sync_sizes(m)
    return swaps

#| export
def append_inputs(
    m:nn.Module,             # Consumer: `nn.Linear` or a convolution with one group
    weight:torch.Tensor,     # New outgoing weights in the layout of `m.weight`, `(d_out, k, ...)`
    shift:torch.Tensor=None  # Added to the bias `(d_out,)`; None leaves the bias parameter alone
)->list:                     # Swaps: `(old, new)` parameters
    "Append `k` input neurons (or channels) to `m` in place."
    if getattr(m, 'groups', 1)>1: raise ValueError(f"cannot append inputs to a grouped {type(m).__name__}: {m}; grow a site whose consumer has groups=1")
    swaps = [_swap(m, 'weight', _append(m.weight, weight, 1))]
    if shift is not None:
        if m.bias is None: raise ValueError(f"{m} has no bias that could take up the constant of the new neurons")
        bias = m.bias.detach().clone()
        bias[:len(shift)] += shift.to(bias)
        swaps.append(_swap(m, 'bias', bias))
    sync_sizes(m)
    return swaps

#| export
@singledispatch
def bud(
    m:nn.Module, # Layer between producer and consumer that keeps something per channel
    k:int        # Number of new channels
)->nn.Module:
    "A layer like `m` with `k` channels that passes them on unchanged."
    raise TypeError(f"{type(m).__name__} cannot be widened: no rule is registered for it; add one with `bud.register({type(m).__name__})`")

def _like(new, m):
    "Give `new` the dtype, device and mode of `m`."
    ref = next((t for t in (*m.parameters(),*m.buffers()) if t.is_floating_point()), None)
    if ref is not None: new = new.to(device=ref.device, dtype=ref.dtype)
    return new.train(m.training).requires_grad_(False)

#| export
@bud.register
def _(m:_NormBase, k):
    return _like(type(m)(k, eps=m.eps, momentum=m.momentum, affine=m.affine, track_running_stats=m.track_running_stats), m)

@bud.register
def _(m:nn.PReLU, k): return _like(nn.PReLU(k), m)

#| export
@bud.register
def _(m:_ConvNd, k):
    new = _like(type(m)(k, k, m.kernel_size, m.stride, m.padding, m.dilation, groups=k, bias=m.bias is not None, padding_mode=m.padding_mode), m)
    for p in new.parameters(): p.zero_()
    new.weight[(slice(None),0,*(s//2 for s in m.kernel_size))] = 1.
    return new

#| export
def append_channels(
    m:nn.Module,  # Layer between producer and consumer
    new:nn.Module # Its bud, holding the new channels
)->list:          # Swaps: `(old, new)` parameters
    "Append the channels of the bud `new` to `m` in place."
    swaps = [_swap(m, n, _append(p, new._parameters[n], 0)) for n,p in m._parameters.items() if p is not None]
    for n,b in m._buffers.items():
        if b is not None and b.dim(): m._buffers[n] = _append(b, new._buffers[n], 0)
    if any(t is not None for t in (*m._parameters.values(),*m._buffers.values())): sync_sizes(m)
    else: m.num_features += new.num_features
    return swaps

#| export
def _layout(m):
    "Everything an edit can change on one module: its tables of tensors and hooks and its plain attributes."
    tables = {n:(t,dict(t)) for n,t in m.__dict__.items() if isinstance(t, dict) and n!='_modules'}
    return tables, {n:v for n,v in m.__dict__.items() if not isinstance(v, dict)}

#| export
@contextmanager
def surgery_guard(
    model:nn.Module # Model that is about to be edited
):
    "Restore every module of `model` to its present layout if the block raises."
    layouts = [(m,*_layout(m)) for m in model.modules()]
    try: yield
    except BaseException:
        for m,tables,plain in layouts:
            for table,entries in tables.values(): _refill(table, entries)
            for n in [n for n,v in m.__dict__.items() if not isinstance(v,dict) and n not in plain]: del m.__dict__[n]
            m.__dict__.update(plain)
        raise

def _refill(table, entries):
    "Make `table` hold exactly `entries` again, in the same order."
    table.clear()
    table.update(entries)

#| export
def _new_shapes(model, state_dict):
    "`(key, module, table, name, shape)` of every tensor of `model` that has another shape in `state_dict`."
    for prefix,m in model.named_modules():
        for table in (m._parameters, m._buffers):
            for n,t in table.items():
                key = f'{prefix}.{n}' if prefix else n
                if t is not None and key in state_dict and t.shape!=state_dict[key].shape: yield key,m,table,n,state_dict[key].shape

def _check_growth(model, todo):
    "Refuse shapes that growth cannot have made."
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for key,_,table,n,shape in todo:
        now = table[n].shape
        if len(now)!=len(shape) or any(a>b for a,b in zip(now,shape)) or now[2:]!=shape[2:]:
            raise ValueError(f"`{key}` is {tuple(now)} in the model and {tuple(shape)} in the file: not a grown version of this model; build the model with the seed widths of the saved run")
        if owners[id(table[n])]>1: raise ValueError(f"`{key}` is shared with another layer (tied weights), which growth never widens; load the file into the model it was saved from")

#| export
def fit_to(
    model:nn.Module, # Model at its seed size, or anywhere between it and the size in the file
    state_dict:dict  # Tensors by name, as in `model.state_dict()`
)->list:             # Swaps: `(old, new)` parameters
    "Widen the layers of `model` in place to the shapes in `state_dict`; all or nothing. `ValueError` names a tensor that growth cannot have made, `TypeError` a layer without a rule."
    todo,swaps = list(_new_shapes(model, state_dict)),[]
    _check_growth(model, todo)
    with surgery_guard(model):
        for _,m,table,n,shape in todo:
            value = torch.zeros(shape, dtype=table[n].dtype, device=table[n].device).contiguous(memory_format=_memory_format(table[n]))
            value[tuple(slice(s) for s in table[n].shape)] = table[n].detach()
            if table is m._parameters: swaps.append(_swap(m, n, value))
            else: table[n] = value
        for key,m in {id(m):(k,m) for k,m,*_ in todo}.values():
            sync_sizes(m)
            sizes = {n:len(t) for n,t in (*m._parameters.items(),*m._buffers.items()) if t is not None and t.dim()}
            if len(set(sizes.values()))>1: raise ValueError(f"the file gives the layer of `{key}` tensors of different lengths ({sizes}); it was not saved from a grown model")
    return swaps
