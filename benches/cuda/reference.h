// RACE with the ratio in doubles, from its definition, for one kv head and its queries.
#pragma once
#include <cmath>
#include <vector>
typedef std::vector<double> V;
struct Problem {
    int tables, planes, dim, value_dim, tokens, group;
    double beta;
    const double *w;             // [bits, dim]
    V q, k, v, g;                // q: [group][tokens][dim]
    V a0, b0, da, db;
    // Of a bucket normalisation: 1 / L; 0 under the ratio.
    double share = 0;            // state before; gradient of the state after
};
struct Answer { V o, a, b, dq, dk, dv, dw, da, db; double dbeta = 0; };
struct Hash { V t, phi; };
inline Hash hash(const Problem &p, const double *x) {
    int R = 1 << p.planes;
    Hash h{V(p.tables * p.planes), V(p.tables * R)};
    for (int i = 0; i < p.tables * p.planes; i++) {
        double u = 0;
        for (int c = 0; c < p.dim; c++) u += p.w[i * p.dim + c] * x[c];
        h.t[i] = tanh(u);
    }
    for (int s = 0; s < p.tables * R; s++) {
        double f = 1;
        for (int j = 0; j < p.planes; j++) {
            double z = 2 * p.beta * h.t[s / R * p.planes + j];
            f *= 1 / (1 + exp((s >> (p.planes - 1 - j) & 1) ? -z : z));
        }
        h.phi[s] = f;
    }
    return h;
}
inline void unhash(const Problem &p, const double *x, const Hash &h, const V &dphi, double *dx, Answer &out) {
    int R = 1 << p.planes;
    for (int i = 0; i < p.tables * p.planes; i++) {
        double m = tanh(p.beta * h.t[i]), s = 0;
        for (int r = 0; r < R; r++) {
            int b = i / p.planes * R + r;
            double c = (r >> (p.planes - 1 - i % p.planes) & 1) ? 1 : -1;
            s += dphi[b] * h.phi[b] * (c - m);
        }
        out.dbeta += h.t[i] * s;
        double du = p.beta * s * (1 - h.t[i] * h.t[i]);
        for (int c = 0; c < p.dim; c++) {
            dx[c] += du * p.w[i * p.dim + c];
            out.dw[i * p.dim + c] += du * x[c];
        }
    }
}
inline Answer reference(const Problem &p, bool backward) {
    int S = p.tables << p.planes, E = p.value_dim, D = p.dim, T = p.tokens, G = p.group;
    Answer out;
    out.o.assign((size_t)G * T * E, 0);
    out.dq.assign((size_t)G * T * D, 0);
    out.dk.assign((size_t)T * D, 0);
    out.dv.assign((size_t)T * E, 0);
    out.dw.assign(p.tables * p.planes * D, 0);
    out.a = p.a0;
    out.b = p.b0;
    std::vector<Hash> kh(T), qh((size_t)G * T);
    V dens((size_t)G * T), sent_a, sent_b;
    for (int i = 0; i < T; i++) {
        kh[i] = hash(p, &p.k[(size_t)i * D]);
        for (int s = 0; s < S; s++) {
            out.a[s] += kh[i].phi[s];
            for (int c = 0; c < E; c++) out.b[s * E + c] += kh[i].phi[s] * p.v[(size_t)i * E + c];
        }
        for (int g = 0; g < G; g++) {
            size_t r = (size_t)g * T + i;
            qh[r] = hash(p, &p.q[r * D]);
            double d = 0;
            if (p.share > 0) {
                V dphi(S);
                for (int s = 0; s < S; s++) {
                    double weight = p.share / (out.a[s] + 1e-6), dy = 0;
                    for (int c = 0; c < E; c++) {
                        out.o[r * E + c] += qh[r].phi[s] * weight * out.b[s * E + c];
                        if (backward) dy += p.g[r * E + c] * out.b[s * E + c];
                    }
                    dphi[s] = dy * weight;
                    sent_a.push_back(-dy * qh[r].phi[s] * weight / (out.a[s] + 1e-6));
                    sent_b.push_back(qh[r].phi[s] * weight);
                }
                if (backward) unhash(p, &p.q[r * D], qh[r], dphi, &out.dq[r * D], out);
                continue;
            }
            for (int s = 0; s < S; s++) {
                d += qh[r].phi[s] * out.a[s];
                for (int c = 0; c < E; c++) out.o[r * E + c] += qh[r].phi[s] * out.b[s * E + c];
            }
            for (int c = 0; c < E; c++) out.o[r * E + c] /= d;
            dens[r] = d;
            if (!backward) continue;
            double gd = 0;
            for (int c = 0; c < E; c++) gd -= p.g[r * E + c] * out.o[r * E + c];
            V dphi(S);
            for (int s = 0; s < S; s++) {
                double x = gd * out.a[s];
                for (int c = 0; c < E; c++) x += p.g[r * E + c] * out.b[s * E + c];
                dphi[s] = x / d;
            }
            unhash(p, &p.q[r * D], qh[r], dphi, &out.dq[r * D], out);
        }
    }
    if (!backward) return out;
    out.da = p.da;
    out.db = p.db;
    for (int j = T - 1; j >= 0; j--) {
        for (int g = 0; g < G; g++) {
            size_t r = (size_t)g * T + j;
            if (p.share > 0) {
                for (int s = 0; s < S; s++) {
                    size_t at = ((size_t)j * G + g) * S + s;
                    out.da[s] += sent_a[at];
                    for (int c = 0; c < E; c++) out.db[s * E + c] += sent_b[at] * p.g[r * E + c];
                }
                continue;
            }
            double gd = 0;
            for (int c = 0; c < E; c++) gd -= p.g[r * E + c] * out.o[r * E + c];
            for (int s = 0; s < S; s++) {
                out.da[s] += qh[r].phi[s] * gd / dens[r];
                for (int c = 0; c < E; c++) out.db[s * E + c] += qh[r].phi[s] * p.g[r * E + c] / dens[r];
            }
        }
        V dphi(S);
        for (int s = 0; s < S; s++) {
            double x = out.da[s];
            for (int c = 0; c < E; c++) {
                x += out.db[s * E + c] * p.v[(size_t)j * E + c];
                out.dv[(size_t)j * E + c] += kh[j].phi[s] * out.db[s * E + c];
            }
            dphi[s] = x;
        }
        unhash(p, &p.k[(size_t)j * D], kh[j], dphi, &out.dk[(size_t)j * D], out);
    }
    return out;
}
