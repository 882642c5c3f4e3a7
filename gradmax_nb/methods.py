#| export
from dataclasses import dataclass, field
import torch
from gradmax_nb.measure import (Measurement, activity, existing_incoming, existing_outgoing, existing_rms, fewer, gain, gradient_in, input_energy, leading_directions,
    loss_with, positions, rank_of, top_directions_of, with_neurons)

#| export
@dataclass
class Proposal:
    "Weights of `k` new neurons and what they promise."
    incoming:torch.Tensor  # `(k, rows)`
    outgoing:torch.Tensor  # `(k, cols)`
    sigma:torch.Tensor     # `(k,)`: singular values; for other methods the gradient norm per unit length of each neuron
    predicted:float        # Norm of the gradient that the zero side will get
    mirror:bool=False      # True where the outgoing side is the zero one

#| export
def _unit(t): return t/t.norm(dim=1,keepdim=True).clamp_min(torch.finfo(t.dtype).tiny)

def _generator(m): return torch.Generator().manual_seed(m.seed)

def _gaussian(m, k, size): return _unit(torch.randn(k, size, generator=_generator(m)).to(m.weight))

#| export
class Incoming:
    "The incoming side of a site: lengths of `(k, rows)` directions."
    def existing(self, m): return existing_incoming(m)

class Outgoing:
    "The outgoing side of a site: lengths of `(k, cols)` directions."
    def existing(self, m): return existing_outgoing(m)

#| export
def _check_positive(rule, name):
    value = getattr(rule, name)
    if value is not None and not value>0: raise ValueError(f"{type(rule).__name__} needs a positive {name}, got {value}: neurons of length 0 would never learn")

@dataclass
class MeanNorm:
    "Every new vector is as long as the mean of the existing ones on its side (the official code's rule)."
    scale:float=1. # Times this; the paper's image experiments use 0.5
    def __post_init__(self): _check_positive(self, 'scale')
    def __call__(self, m, directions, sigma, side):
        mean = side.existing(m).norm(dim=1).mean().item()
        if mean==0: raise ValueError(f"`{m.site.name}`: the existing weights on the {type(side).__name__.lower()} side are all zero, so their mean length is no length for new ones; use FixedLength, or train a step first")
        return torch.full_like(sigma, self.scale*mean)

#| export
@dataclass
class FixedLength:
    "Every new vector has the same given length."
    length:float=.5 # As in the official VGG configuration
    def __post_init__(self): _check_positive(self, 'length')
    def __call__(self, m, directions, sigma, side): return torch.full_like(sigma, self.length)

#| export
@dataclass
class SigmaWeighted:
    "Lengths in proportion to the singular values, with the same total budget as `base`."
    base:object=field(default_factory=MeanNorm) # Rule that sets the budget
    def __call__(self, m, directions, sigma, side):
        return sigma/sigma.norm()*self.base(m,directions,sigma,side).norm()

#| export
def _solve(
    value,              # `lengths -> (k,)`, positive
    wanted,             # What it should be
    start:torch.Tensor, # First lengths, `(k,)`
    now:torch.Tensor,   # `value(start)`
    power:float,        # First guess: `value` goes like this power of the length
    rounds:int=6        # Evaluations of `value` at the most
)->torch.Tensor:
    "Lengths at which `value` is `wanted`, to a percent; a length that hardly matters stays as it is."
    length,power = start,torch.full_like(start,power)
    for _ in range(rounds):
        open_ = (now>0) & (power>.1) & ((wanted/now).log().abs()>.01)
        if not open_.any(): break
        move = ((wanted/now).log()/power).clamp(-7,7)
        new = value(torch.where(open_, length*move.exp(), length))
        power = torch.where(open_, (new/now).log()/move, power)
        open_ &= power>.1
        length,now = torch.where(open_, length*move.exp(), length),torch.where(open_, new, now)
    return length

#| export
@dataclass
class ActivationRMS:
    "Each new neuron's activation is as large, root mean square, as the existing ones' on average; `MeanNorm` where the length does not change it (behind a norm)."
    scale:float=1. # Times this
    def __post_init__(self): _check_positive(self, 'scale')
    def __call__(self, m, directions, sigma, side):
        if not isinstance(side, Incoming): raise ValueError(f"`{m.site.name}`: ActivationRMS sets incoming weights, but this method keeps them at zero; use MeanNorm, FixedLength or CurvatureBudget")
        start,wanted = MeanNorm()(m, directions, sigma, side),self.scale*existing_rms(m)
        rms = lambda lengths: activity(m, directions*lengths[:,None]).rms
        return _solve(rms, wanted, start, rms(start), 1.) if wanted>0 else start

#| export
def block_curvature(
    m:Measurement,          # Site
    incoming:torch.Tensor,  # `(k, rows)`
    outgoing:torch.Tensor,  # `(k, cols)`
    mirror:bool,            # True if the outgoing side is the one at zero
    iters:int=8             # Lanczos steps; each costs a double backward pass of the growth batch
)->float:
    "Largest curvature of the loss in the weights of the side that starts at zero."
    zero,fixed = (outgoing,incoming) if mirror else (incoming,outgoing)
    w = torch.zeros_like(zero).requires_grad_()
    loss = loss_with(m,fixed,w,False) if mirror else loss_with(m,w,fixed,True)
    g, = torch.autograd.grad(loss, w, create_graph=True)
    return _top_eigenvalue(lambda v: _hessian_times(g, w, v), torch.randn(w.shape, generator=_generator(m)).to(w), iters)

def _hessian_times(g, w, v):
    "Hessian times `v`, with `g` the gradient at `w`; zero where the loss is linear."
    return torch.autograd.grad(g, w, v, retain_graph=True)[0] if g.requires_grad else torch.zeros_like(w)

#| export
def _top_eigenvalue(apply, v, iters):
    "Largest eigenvalue of a symmetric operator seen from `iters` Lanczos steps: from below, and 0 if none is positive."
    Q,HQ = v.new_zeros(0,v.numel()),v.new_zeros(0,v.numel())
    for _ in range(min(iters, v.numel())):
        x = v.flatten()
        for _ in range(2): x = x - (Q@x)@Q # twice is enough for orthogonality to rounding
        if x.norm() <= 1e-6*v.norm(): break
        Q = torch.cat([Q, (x/x.norm())[None]])
        v = apply(Q[-1].view_as(v))
        HQ = torch.cat([HQ, v.flatten()[None]])
    T = Q@HQ.T
    return torch.linalg.eigvalsh((T+T.T)/2)[-1].clamp_min(0).item() if len(Q) else 0.

#| export
@dataclass
class CurvatureBudget:
    "The lengths of `base`, shortened together until learning rate times curvature is at most `fraction`."
    base:object=field(default_factory=MeanNorm) # Rule that proposes lengths
    lr:float=None          # Learning rate; None takes the largest of the optimizer given to `grow`
    fraction:float=1.      # 1 is the step that the descent bound likes best; 2 is the edge of stability
    def __post_init__(self):
        for name in ('lr','fraction'): _check_positive(self, name)

    def __call__(self, m, directions, sigma, side):
        lr = m.lr if self.lr is None else self.lr
        if lr is None: raise ValueError(f"`{m.site.name}`: CurvatureBudget needs a learning rate; give it one (lr=...) or pass the optimizer to grow")
        lengths = self.base(m, directions, sigma, side)
        curvature = lambda scale: scale.new_full((1,), _curvature_at(m, directions*(lengths*scale)[:,None], side))
        one = lengths.new_ones(1)
        now,wanted = curvature(one),.99*self.fraction/lr
        return lengths*_solve(curvature, wanted, one, now, 2.) if now>wanted else lengths

def _curvature_at(m, w, side):
    "Curvature in the side at zero when the other one is `w`."
    mirror = isinstance(side, Incoming)
    zero = w.new_zeros(len(w), m.cols if mirror else m.rows)
    return block_curvature(m, *((w,zero) if mirror else (zero,w)), mirror)

#| export
@dataclass
class AsComputed:
    "Keep the signs the decomposition happened to return (the published method)."
    def __call__(self, m, V, G): return V,G

@dataclass
class SignRule:
    "Give each direction the sign under which its first step lowers the loss more."
    samples:int=32 # At least so many samples of the growth batch decide, more where they have few positions (4096 in all)
    def __call__(self, m, V, G):
        few = fewer(m, max(self.samples, 4096//positions(m)))
        up,down = gain(few, V, G)
        sign = torch.where(up>=down, 1., -1.).to(V)[:,None]
        return V*sign,G*sign

#| export
def ascend(
    score,          # `directions (k, d) -> (k,)`, differentiable
    start:torch.Tensor, # Unit directions
    steps:int,      # Gradient steps on the sphere
    lr:float        # Angle of the first step, in radians; halves where a step fails to improve
)->torch.Tensor:
    "Climb `score` on the unit sphere, each direction by itself; never ends below its start."
    best,value = start,score(start).detach()
    angle = torch.full_like(value, lr)
    for _ in range(steps):
        x = best.detach().requires_grad_()
        with torch.enable_grad(): g, = torch.autograd.grad(score(x).sum(), x)
        tangent = _unit(g - (g*best).sum(1,keepdim=True)*best)
        trial = _unit(best*angle.cos()[:,None] + tangent*angle.sin()[:,None])
        new = score(trial).detach()
        better = new>value
        best,value = torch.where(better[:,None],trial,best),torch.where(better,new,value)
        angle = torch.where(better, angle*1.2, angle*.5)
    return best

#| export
def _pick(P, score, k, similarity):
    "Indices of the best `k` rows of `P` that carry a gradient and are not alike; opposite signs, then near copies, only where there is nothing else."
    C = (_unit(P)@_unit(P).T).tolist()
    order,taken = [i for i in score.argsort(descending=True).tolist() if score[i]>0],[]
    for limit in (lambda c: abs(c)<similarity, lambda c: c<similarity, lambda c: c<.999):
        for i in order:
            if len(taken)<k and i not in taken and all(limit(C[i][j]) for j in taken): taken.append(i)
    return taken

#| export
@dataclass
class Lookahead:
    "Climb the real one-sided gain from both signs of each direction; keep the best ends that are not alike."
    steps:int=30         # Steps of the ascent
    lr:float=.3          # First step, as an angle in radians
    similarity:float=.9  # Largest |cosine| between two chosen directions: several starts often climb to the same end
    def __call__(self, m, V, G):
        start = torch.cat([V,-V])
        ends = torch.cat([ascend(lambda v: gain(m,v)[0], start, self.steps, self.lr), start])
        V = ends[_pick(ends, gain(m,ends)[0], len(V), self.similarity)]
        return V,gradient_in(m,V)

#| export
@dataclass
class Sequential:
    "Choose neurons one after the other: each sees the gradient left over after those before it took their best step."
    inner:object=field(default_factory=Lookahead) # Refinement of each single direction
    def __call__(self, m, V, G):
        chosen,steps,now = [],[],m
        for _ in range(len(V)):
            sigma,u,v = top_directions_of(now, 1)
            v,g = self.inner(now, v, sigma[:,None]*u)
            steps.append(_best_step(m, steps, chosen, v, -_unit(g)))
            chosen.append(v)
            now = with_neurons(m, torch.cat(steps), torch.cat(chosen))
        V = torch.cat(chosen)
        return V,gradient_in(m,V)

#| export
def _best_step(m, steps, chosen, v, u):
    "The multiple of `u`, out of powers of two, with which the neuron `v` lowers the batch loss most."
    size,V = existing_incoming(m).norm(dim=1).mean().clamp_min(1e-3),torch.cat([*chosen,v])
    trials = [u*size*2.**i for i in range(-8,4)]
    with torch.no_grad(): losses = [loss_with(m, torch.cat([*steps,t]), V, True).item() for t in trials]
    return trials[min(range(len(trials)), key=lambda i: losses[i] if losses[i]==losses[i] else float('inf'))]

#| export
def _outgoing_proposal(m, V, G, sigma, length):
    "Incoming zero, outgoing directions `V` with the lengths of `length`; `G` is M V."
    lengths = length(m, V, sigma, Outgoing())[:,None]
    return Proposal(V.new_zeros(len(V),m.rows), V*lengths, sigma, (G*lengths).norm().item())

@dataclass
class GradMax:
    "Incoming zero, outgoing along the top singular vectors of the growth matrix (Evci et al. 2022, Eq. 11), which maximise the gradient norm."
    refine:object=field(default_factory=SignRule) # `AsComputed`, `SignRule`, `Lookahead` or `Sequential`
    length:object=field(default_factory=MeanNorm) # Length rule
    def propose(self, m, k):
        sigma,U,V = top_directions_of(m, k)
        return _outgoing_proposal(m, *self.refine(m, V, sigma[:,None]*U), sigma, self.length)

#| export
@dataclass
class Ascent:
    "Climb the score on the sphere from each candidate."
    steps:int=30 # Steps of the ascent
    lr:float=.2  # First step, as an angle in radians

#| export
def _size(m):
    "Length at which directions are compared: the mean of the existing ones."
    mean = existing_incoming(m).norm(dim=1).mean().item()
    return mean if mean>0 else 1.

def _mirror_proposal(m, U, sigma, length):
    "Outgoing zero, incoming directions `U` with the lengths of `length`."
    U = U*length(m, U, sigma, Incoming())[:,None]
    return Proposal(U, U.new_zeros(len(U),m.cols), sigma, activity(m,U).gradient.norm().item(), mirror=True)

def _strength(m, U):
    "Gradient norm per unit length that each neuron's outgoing weights would get."
    return activity(m, U*_size(m)).gradient.norm(dim=1)/_size(m)

#| export
def _candidates(m, U, method):
    "Both signs of each direction, the climbed ones before them if the method climbs, and the scores of all."
    U,score = _unit(torch.cat([U,-U])),lambda u: method.score(activity(m, u*_size(m)))
    if method.ascent is not None: U = torch.cat([ascend(score, U, method.ascent.steps, method.ascent.lr), U])
    return U,score(U)

def _mirror(m, k, method, metric, back):
    "Candidates from the (whitened) growth matrix, ranked by the method's score in the real path."
    for n in (method.candidates*k, m.rows+m.cols):
        sigma,U,_ = leading_directions(m, min(n,m.rows,m.cols), metric)
        U = U[:rank_of(m, sigma)]
        U,score = _candidates(m, U if metric is None else U@metric, method)
        best = _pick(U if back is None else U@back, score, k, method.similarity)
        if len(best)==k: return _mirror_proposal(m, U[best], score[best], method.length)
    raise ValueError(f"`{m.site.name}`: {k} neurons were asked for, but this batch offers {len(best)} directions with a gradient, signs included; ask for fewer or give a larger growth batch")

#| export
@dataclass
class MirrorGradMax:
    "Outgoing zero, incoming along singular vectors of the growth matrix, signs and order by the gradient norm the outgoing weights really get."
    length:object=field(default_factory=MeanNorm) # Length rule for the incoming weights
    ascent:object=None      # `Ascent()` climbs that gradient norm from each candidate
    candidates:int=2        # Singular directions tried, in multiples of `k`
    similarity:float=.9     # Largest |cosine| between two chosen directions
    def score(self, act): return act.gradient.norm(dim=1)
    def propose(self, m, k): return _mirror(m, k, self, None, None)

#| export
def _roots(S, floor):
    "`S` to the powers -1/2 and 1/2, eigenvalues floored at `floor` times the largest."
    values,Q = torch.linalg.eigh(S.double())
    values = values.clamp_min(floor*values[-1].clamp_min(1e-300))
    return [((Q*values**p)@Q.T).to(S.dtype) for p in (-.5,.5)]

@dataclass
class BoundMax:
    "Outgoing zero, incoming directions that maximise the guaranteed decrease: gradient norm over activation size."
    length:object=field(default_factory=ActivationRMS) # Length rule for the incoming weights
    ascent:object=None      # `Ascent()` climbs the ratio from each candidate
    candidates:int=2        # Whitened singular directions tried, in multiples of `k`
    similarity:float=.9     # Largest |cosine| between two chosen directions, in whitened coordinates
    floor:float=1e-3        # Eigenvalues of the inputs' second moment are raised to this fraction of the largest
    def score(self, act): return act.gradient.norm(dim=1)/act.rms.clamp_min(1e-30)
    def propose(self, m, k): return _mirror(m, k, self, *_roots(input_energy(m), self.floor))

#| export
@dataclass
class RandomGrowth:
    "Incoming zero, outgoing Gaussian directions."
    length:object=field(default_factory=MeanNorm) # Length rule
    def directions(self, m, k): return _gaussian(m, k, m.cols)
    def propose(self, m, k):
        V = self.directions(m, k)
        G = gradient_in(m, V)
        return _outgoing_proposal(m, V, G, G.norm(dim=1), self.length)

@dataclass
class OfficialRandom(RandomGrowth):
    "Incoming zero, outgoing directions with all entries positive, as in the paper's code."
    def directions(self, m, k): return _unit(torch.rand(k, m.cols, generator=_generator(m)).to(m.weight))

#| export
def _firing(m, U):
    "`U` with directions turned around that never fire on this batch, so that no neuron is born dead."
    return torch.where(activity(m, U*_size(m)).rms[:,None]>0, U, -U)

@dataclass
class MirrorRandom:
    "Outgoing zero, incoming Gaussian directions."
    length:object=field(default_factory=MeanNorm) # Length rule
    def propose(self, m, k):
        U = _firing(m, _gaussian(m, k, m.rows))
        return _mirror_proposal(m, U, _strength(m,U), self.length)

#| export
def _adam(loss, params, project, steps, lr):
    "Minimise `loss(*params)` by Adam, projecting after each step; returns the last point."
    params = [p.clone().requires_grad_() for p in params]
    opt = torch.optim.Adam(params, lr=lr)
    for _ in range(steps):
        with torch.enable_grad(): grads = torch.autograd.grad(loss(*params), params)
        for p,g in zip(params,grads): p.grad = g
        opt.step()
        with torch.no_grad():
            for p,q in zip(params, project(*params)): p.copy_(q)
    return [p.detach() for p in params]

#| export
@dataclass
class GradMaxOpt:
    "Incoming zero, outgoing directions from Adam steps that maximise the gradient norm (the paper's GradMaxOpt)."
    steps:int=100  # Adam steps, as in the paper
    lr:float=1e-2  # On unit directions; with the official 1e-3 they barely leave the random start
    length:object=field(default_factory=MeanNorm) # Length rule
    def propose(self, m, k):
        V, = _adam(lambda V: -gradient_in(m,V).norm(), [_gaussian(m,k,m.cols)], lambda V: [_unit(V)], self.steps, self.lr)
        G = gradient_in(m, V)
        return _outgoing_proposal(m, V, G, G.norm(dim=1), self.length)

@dataclass
class MirrorGradMaxOpt(GradMaxOpt):
    "Outgoing zero, incoming directions from Adam steps that maximise the outgoing weights' gradient norm."
    def propose(self, m, k):
        U, = _adam(lambda U: -activity(m,U*_size(m)).gradient.norm(), [_firing(m,_gaussian(m,k,m.rows))], lambda U: [_unit(U)], self.steps, self.lr)
        return _mirror_proposal(m, U, _strength(m,U), self.length)

#| export
@dataclass
class Firefly:
    "Both sides from Adam steps that lower the batch loss; the incoming side stays small (Wu et al. 2020, as the paper uses it)."
    epsilon:float=.01 # Length of the small side, as a fraction of the mean length of existing vectors; must be positive
    steps:int=100     # Adam steps
    lr:float=1e-2     # On unit vectors
    length:object=field(default_factory=MeanNorm) # Length rule of the large side

    def __post_init__(self):
        if not self.epsilon>0: raise ValueError(f"{type(self).__name__} needs a positive epsilon, got {self.epsilon}: at 0 the other side never receives a gradient")

    def lengths(self, m, U, V):
        "Lengths of incoming and outgoing vectors."
        return MeanNorm(self.epsilon)(m,U,U.new_ones(len(U)),Incoming()), self.length(m,V,V.new_ones(len(V)),Outgoing())

    def propose(self, m, k):
        return _fire(m, self, *_fit_both(m, self, k, True), mirror=False)

#| export
@dataclass
class MirrorFirefly(Firefly):
    "Firefly with the outgoing side small."
    def lengths(self, m, U, V):
        return self.length(m,U,U.new_ones(len(U)),Incoming()), MeanNorm(self.epsilon)(m,V,V.new_ones(len(V)),Outgoing())
    def propose(self, m, k):
        return _fire(m, self, *_fit_both(m, self, k, False), mirror=True)

#| export
def _fit_both(m, method, k, zero_incoming):
    "Incoming and outgoing weights after Firefly's Adam steps."
    U,V = _gaussian(m,k,m.rows+m.cols).split([m.rows,m.cols],1)
    U,V = _unit(U) if zero_incoming else _firing(m,_unit(U)),_unit(V)
    lu,lv = (t[:,None] for t in method.lengths(m,U,V))
    U,V = _adam(lambda U,V: loss_with(m,U*lu,V*lv,zero_incoming), [U,V], lambda U,V: [_unit(U),_unit(V)], method.steps, method.lr)
    return U*lu,V*lv

def _fire(m, method, U, V, mirror):
    "Proposal with the gradients that autograd measures with both sides in place."
    small = (V if mirror else U).clone().requires_grad_()
    loss = loss_with(m, U, small, False) if mirror else loss_with(m, small, V, True)
    g, = torch.autograd.grad(loss, small)
    return Proposal(U, V, g.norm(dim=1), g.norm().item(), mirror=mirror)
