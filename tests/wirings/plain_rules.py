"""Rules that act between steps as NumPy loops in float64: weights, masks, optimisers and gradients.

Random scores alone come from PyTorch's generator, seeded as rules.md says: a function of seed, step and name.
"""

import math
import zlib

import numpy as np
import torch

LR, BETAS, EPS = {"sgd": 0.01, "adam": 0.01}, (0.9, 0.999), 1e-8
MOMENTUM, DECAY = 0.9, 0.02
STEPS = 36
SIZES = (6, 5, 4)


def top(values, k):
    """The k places of largest magnitude, ties to the lower."""
    return sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k])


def mask(places, n):
    found = np.zeros(n, dtype=bool)
    found[list(places)] = True
    return found


class Linear:
    """y = W x, the loss Σ (y − t)²."""

    n = 24

    def gradient(self, values, x, t):
        matrix = values.reshape(4, 6)
        return (2 * (x @ matrix.T - t).T @ x).ravel()


class Graph:
    """Three blocks of nodes, tanh at the middle one: the second product has the sources of both blocks before it."""

    n = 6 * 5 + 11 * 4

    def gradient(self, values, x, t):
        first, second = values[:30].reshape(5, 6), values[30:].reshape(4, 11)
        states = np.tanh(x @ first.T)
        both = np.concatenate([x, states], axis=1)
        outer = 2 * (both @ second.T - t)
        inner = (outer @ second[:, 6:]) * (1 - states**2)
        return np.concatenate([(inner.T @ x).ravel(), (outer.T @ both).ravel()])


class Shared:
    """Two layers with tanh between them, whose weights have one budget."""

    n = 6 * 5 + 5 * 4

    def gradient(self, values, x, t):
        first, second = values[:30].reshape(5, 6), values[30:].reshape(4, 5)
        states = np.tanh(x @ first.T)
        outer = 2 * (states @ second.T - t)
        inner = (outer @ second) * (1 - states**2)
        return np.concatenate([(inner.T @ x).ravel(), (outer.T @ states).ravel()])


class Plain:
    """A rule on lists. Subclasses say which candidates are real, learn and are trained, and what follows a step."""

    def __init__(self, weight, real, k, seed, name, adam):
        self.w, self.real, self.k, self.n = weight.copy(), real.copy(), k, len(weight)
        self.seed, self.name, self.adam = seed, name, adam
        self.m, self.v, self.t = np.zeros(self.n), np.zeros(self.n), 0
        self.setup()

    def setup(self):
        pass

    def values(self):
        return self.w * self.real

    def learning(self):
        return self.trained()

    def trained(self):
        return self.real

    def penalty_gradient(self):
        return 0.0

    def skips(self):
        return False

    def after_step(self, dense):
        pass

    def step(self, task, x, t):
        dense = task.gradient(self.values(), x, t)
        gradient = np.where(self.learning(), dense, 0.0) + self.penalty_gradient()
        trained = np.zeros(self.n, dtype=bool) if self.skips() else self.trained()
        before = self.w.copy(), self.m.copy(), self.v.copy()
        self.t += 1
        gradient = gradient + DECAY * self.w
        if self.adam:
            self.m = BETAS[0] * self.m + (1 - BETAS[0]) * gradient
            self.v = BETAS[1] * self.v + (1 - BETAS[1]) * gradient**2
            ahead = self.m / (1 - BETAS[0] ** self.t), self.v / (1 - BETAS[1] ** self.t)
            self.w = self.w - LR["adam"] * ahead[0] / (np.sqrt(ahead[1]) + EPS)
        else:
            self.m = MOMENTUM * self.m + gradient
            self.w = self.w - LR["sgd"] * self.m
        self.w, self.m, self.v = (
            np.where(trained, new, old) for new, old in zip((self.w, self.m, self.v), before, strict=True)
        )
        self.after_step(dense)

    def clear(self, chosen):
        self.w[chosen] = self.m[chosen] = self.v[chosen] = 0.0

    def exchange(self, number, scores, regrown_are_new):
        real = np.flatnonzero(self.real).tolist()
        kept = [real[i] for i in top([self.w[i] for i in real], len(real) - number)]
        others = [i for i in range(self.n) if i not in kept]
        grown = [others[i] for i in top([scores[i] for i in others], number)]
        new = [i for i in grown if regrown_are_new or not self.real[i]]
        self.real = mask(kept + grown, self.n)
        self.clear(np.flatnonzero(~self.real))
        self.clear(new)


class PlainSET(Plain):
    every, zeta = 7, 0.4

    def after_step(self, dense):
        if self.t % self.every == 0:
            key = np.random.SeedSequence((self.seed, self.t, zlib.crc32(self.name.encode())))
            generator = torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]))
            scores = torch.rand(self.n, generator=generator, dtype=torch.float64).tolist()
            self.exchange(min(math.floor(self.zeta * self.k), self.n - self.k), scores, True)


class PlainRigL(Plain):
    every, end, alpha, skip = 6, 27, 0.6, True

    def number(self, t):
        if t == 0 or t % self.every or t >= self.end:
            return 0
        return math.floor(self.alpha / 2 * (1 + math.cos(math.pi * t / self.end)) * self.k)

    def skips(self):
        return self.skip and self.number(self.t + 1) > 0

    def after_step(self, dense):
        if number := self.number(self.t):
            self.exchange(number, dense, False)


class PlainRigLThatUpdates(PlainRigL):
    skip = False


class PlainGMP(Plain):
    begin, end, every = 4, 28, 8

    def after_step(self, dense):
        if self.t < self.begin or (self.t < self.end and (self.t - self.begin) % self.every):
            return
        left = 1 - min((self.t - self.begin) / (self.end - self.begin), 1)
        keep = round(self.n - (self.n - self.k) * (1 - left**3))
        real = np.flatnonzero(self.real).tolist()
        self.real = mask([real[i] for i in top([self.w[i] for i in real], keep)], self.n)
        self.clear(np.flatnonzero(~self.real))


class PlainTopKAST(Plain):
    extra, strength = 7, 0.03

    def setup(self):
        self.rank()

    def rank(self):
        self.real, self.both = mask(top(self.w, self.k), self.n), mask(top(self.w, self.k + self.extra), self.n)

    def trained(self):
        return self.both

    def penalty_gradient(self):
        factor = np.where(self.real, 1.0, np.where(self.both, self.n / self.k, 0.0))
        return self.strength * factor * self.w

    def after_step(self, dense):
        self.rank()


class PlainACDC(Plain):
    switches = (6, 12, 18, 24, 30)

    def after_step(self, dense):
        if self.t not in self.switches:
            return
        if self.switches.index(self.t) % 2 == 0:
            self.real = mask(top(self.w, self.k), self.n)
            self.w[~self.real] = 0.0
        else:
            self.real[:] = True
            self.m[:] = 0.0


class PlainSTR(Plain):
    """The threshold is a weight more: it has the same optimiser and a decay of its own."""

    start, own_decay = -2.0, 0.3

    def setup(self):
        self.s, self.sm, self.sv = self.start, 0.0, 0.0
        self.rank()

    def rank(self):
        self.real = np.abs(self.w) > self.sigma()

    def sigma(self):
        return 1 / (1 + math.exp(-self.s))

    def values(self):
        return np.sign(self.w) * np.maximum(np.abs(self.w) - self.sigma(), 0)

    def trained(self):
        return np.ones(self.n, dtype=bool)

    def learning(self):
        return self.real

    def after_step(self, dense):
        old = np.sign(self.before) * self.real
        slope = -self.sigma() * (1 - self.sigma()) * float((dense * old).sum()) + self.own_decay * self.s
        if self.adam:
            self.sm = BETAS[0] * self.sm + (1 - BETAS[0]) * slope
            self.sv = BETAS[1] * self.sv + (1 - BETAS[1]) * slope**2
            ahead = self.sm / (1 - BETAS[0] ** self.t), self.sv / (1 - BETAS[1] ** self.t)
            self.s -= LR["adam"] * ahead[0] / (math.sqrt(ahead[1]) + EPS)
        else:
            self.sm = MOMENTUM * self.sm + slope
            self.s -= LR["sgd"] * self.sm
        self.rank()

    def step(self, task, x, t):
        self.before = self.w.copy()
        super().step(task, x, t)


class PlainNM(Plain):
    n_of, m_of, strength = 2, 4, 0.05
    rows = ()  # (first candidate, targets, sources) of each block

    def setup(self):
        self.rank()

    def rank(self):
        chosen = []
        for first, targets, sources in self.rows:
            for target in range(targets):
                for group in range(0, sources, self.m_of):
                    places = [first + target * sources + u for u in range(group, min(group + self.m_of, sources))]
                    chosen += [places[i] for i in top([self.w[i] for i in places], min(self.n_of, len(places)))]
        self.real = mask(chosen, self.n)

    def trained(self):
        return np.ones(self.n, dtype=bool)

    def penalty_gradient(self):
        return self.strength * np.where(self.real, 0.0, self.w)

    def after_step(self, dense):
        self.rank()


class PlainSparseMomentum(Plain):
    """One graph: what is pruned is grown in it."""

    every, rate = 6, 0.5

    def trained(self):
        return np.ones(self.n, dtype=bool)

    def after_step(self, dense):
        self.w[~self.real] = 0.0
        if self.t % self.every:
            return
        momentum = self.m / (np.sqrt(self.v) + 1e-8) if self.adam else self.m
        real = np.flatnonzero(self.real).tolist()
        rate = self.rate * (1 + math.cos(math.pi * self.t / STEPS)) / 2
        keep = max(1, len(real) - math.ceil(rate * len(real)))
        kept = [real[i] for i in top([self.w[i] for i in real], keep)]
        others = [i for i in range(self.n) if i not in kept]
        grown = [others[i] for i in top([momentum[i] for i in others], len(real) - keep)]
        self.real = mask(kept + grown, self.n)
        self.w[~self.real] = 0.0
