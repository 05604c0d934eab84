// The selective scan of lightning_slm/nn/selective_scan.py as two loops, for one processor of any kind that GCC or Clang
// compile for. PyTorch's own makes each number in a pass over memory of its own; here a number stays in a register from
// the exponential to the sum. Threads share out rows of the batch and blocks of channels.
//
// Shape letters: B = batch, T = tokens, C = channels, N = states of a channel, L = tokens of a chunk, K = chunks.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
constexpr int64_t LANES = 16, PARTS = 4, WIDTH = LANES * PARTS;  // channels that are worked on together

struct Block {  // one number for each of these channels
    Lanes part[PARTS];
};

// 2^x, to 1e-7 of itself: the whole part goes into the exponent's bits, a polynomial (fitted to the smallest relative
// error, 2e-9, on [-1/2, 1/2]) makes the rest. Below 2^-126 it stays there.
inline Lanes exp2_of(Lanes x) {
    const Lanes lowest = Lanes{} - 126.f, highest = Lanes{} + 127.f;
    x = x < lowest ? lowest : x;
    x = x > highest ? highest : x;
    const Lanes shifter = Lanes{} + 12582912.f;  // 1.5 * 2^23: adding it rounds to whole numbers
    const Lanes shifted = x + shifter, f = x - (shifted - shifter);
    Lanes p = f * 0.0001534581176f + 0.001339993142f;
    p = p * f + 0.00961848896f;
    p = p * f + 0.05550328776f;
    p = p * f + 0.2402264690f;
    p = p * f + 0.6931472057f;
    p = p * f + 1.f;
    Ints bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;  // the shifter's own bits fall out at the top
    Lanes scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

inline float sum_of(const Lanes& x) {  // by halves, which takes four additions one after the other instead of sixteen
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    Half halves[2];
    Quarter quarters[2];
    std::memcpy(halves, &x, sizeof halves);
    const Half eight = halves[0] + halves[1];
    std::memcpy(quarters, &eight, sizeof quarters);
    const Quarter four = quarters[0] + quarters[1];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

inline Block load(const float* from, int64_t width) {
    Block block{};
    std::memcpy(&block, from, width == WIDTH ? sizeof block : width * sizeof(float));
    return block;
}

inline void store(float* to, const Block& block, int64_t width) {
    std::memcpy(to, &block, width == WIDTH ? sizeof block : width * sizeof(float));
}

struct Sizes {
    int64_t B, T, C, N, L, K, blocks;
    Sizes(const at::Tensor& x_BTC, const at::Tensor& rate_NC, int64_t L)
        : B(x_BTC.size(0)), T(x_BTC.size(1)), C(x_BTC.size(2)), N(rate_NC.size(0)), L(L), K((T + L - 1) / L),
          blocks((C + WIDTH - 1) / WIDTH) {}
    int64_t width(int64_t block) const { return std::min(WIDTH, C - block * WIDTH); }
};

// A matrix (N, C) as what one block of channels needs of it.
void load_states(Block* to, const float* from, const Sizes& s, int64_t block) {
    for (int64_t n = 0; n < s.N; n++) to[n] = load(from + n * s.C + block * WIDTH, s.width(block));
}

void store_states(float* to, const Block* from, const Sizes& s, int64_t block) {
    for (int64_t n = 0; n < s.N; n++) store(to + n * s.C + block * WIDTH, from[n], s.width(block));
}

// x, delta (B, T, C), rate (N, C) = A log2(e), b and c (B, T, N), state (B, N, C), starts (B, T)
// -> y (B, T, C), h after the last token (B, N, C), h before each chunk (B, K or 0, N, C)
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& x_BTC, const at::Tensor& delta_BTC, const at::Tensor& rate_NC, const at::Tensor& b_BTN,
    const at::Tensor& c_BTN, const std::optional<at::Tensor>& state_BNC, const std::optional<at::Tensor>& starts_BT,
    int64_t L, bool keep) {
    const Sizes s(x_BTC, rate_NC, L);
    auto y = at::empty_like(x_BTC), h_end = at::empty({s.B, s.N, s.C}, x_BTC.options());
    auto kept = at::empty({s.B, keep ? s.K : 0, s.N, s.C}, x_BTC.options());
    const float *px = x_BTC.const_data_ptr<float>(), *pd = delta_BTC.const_data_ptr<float>();
    const float *pr = rate_NC.const_data_ptr<float>(), *pb = b_BTN.const_data_ptr<float>();
    const float *pc = c_BTN.const_data_ptr<float>(), *ph = state_BNC ? state_BNC->const_data_ptr<float>() : nullptr;
    const bool* ps = starts_BT ? starts_BT->const_data_ptr<bool>() : nullptr;
    float *py = y.data_ptr<float>(), *pe = h_end.data_ptr<float>(), *pk = kept.data_ptr<float>();

    at::parallel_for(0, s.B * s.blocks, 1, [&](int64_t first, int64_t last) {
        std::vector<Block> rate(s.N), h(s.N);
        for (int64_t task = first; task < last; task++) {
            const int64_t row = task / s.blocks, block = task % s.blocks, width = s.width(block), states = s.N * s.C;
            load_states(rate.data(), pr, s, block);
            std::fill(h.begin(), h.end(), Block{});
            if (ph) load_states(h.data(), ph + row * states, s, block);
            for (int64_t t = 0; t < s.T; t++) {
                if (keep && t % L == 0) store_states(pk + (row * s.K + t / L) * states, h.data(), s, block);
                const int64_t token = row * s.T + t, at = token * s.C + block * WIDTH;
                const float *b = pb + token * s.N, *c = pc + token * s.N, alive = ps && ps[token] ? 0.f : 1.f;
                const Block x = load(px + at, width), delta = load(pd + at, width);
                Block sum{};
                for (int64_t n = 0; n < s.N; n++)
                    for (int64_t i = 0; i < PARTS; i++) {
                        const Lanes decay = exp2_of(delta.part[i] * rate[n].part[i]) * alive;
                        h[n].part[i] = decay * h[n].part[i] + x.part[i] * b[n];
                        sum.part[i] += h[n].part[i] * c[n];
                    }
                store(py + at, sum, width);
            }
            store_states(pe + row * states, h.data(), s, block);
        }
    });
    return {y, h_end, kept};
}

// The same tensors, and gradients of y and of h after the last token
// -> gradients of x, delta (where it makes the decay), A, b, c, state; y once more if with_y
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_y_BTC, const at::Tensor& grad_h_BNC, const at::Tensor& x_BTC, const at::Tensor& delta_BTC,
    const at::Tensor& A_NC, const at::Tensor& rate_NC, const at::Tensor& b_BTN, const at::Tensor& c_BTN,
    const std::optional<at::Tensor>& starts_BT, const at::Tensor& kept_BKNC, int64_t L, bool with_y) {
    const Sizes s(x_BTC, rate_NC, L);
    // Sums over channels are made by few threads at once, each into a place of its own.
    const int64_t groups = std::min(s.blocks, std::max<int64_t>(1, 2 * at::get_num_threads() / s.B));
    auto grad_x = at::empty_like(x_BTC), grad_delta = at::empty_like(x_BTC), y = at::empty_like(x_BTC);
    auto grad_A = at::empty({s.B, s.N, s.C}, x_BTC.options()), grad_state = at::empty_like(grad_A);
    auto grad_b = at::zeros({groups, s.B, s.T, s.N}, x_BTC.options()), grad_c = at::zeros_like(grad_b);
    const float *pgy = grad_y_BTC.const_data_ptr<float>(), *pgh = grad_h_BNC.const_data_ptr<float>();
    const float *px = x_BTC.const_data_ptr<float>(), *pd = delta_BTC.const_data_ptr<float>();
    const float *pA = A_NC.const_data_ptr<float>(), *pr = rate_NC.const_data_ptr<float>();
    const float *pb = b_BTN.const_data_ptr<float>(), *pc = c_BTN.const_data_ptr<float>();
    const float* pk = kept_BKNC.const_data_ptr<float>();
    const bool* ps = starts_BT ? starts_BT->const_data_ptr<bool>() : nullptr;
    float *pgx = grad_x.data_ptr<float>(), *pgd = grad_delta.data_ptr<float>(), *py = y.data_ptr<float>();
    float *pgA = grad_A.data_ptr<float>(), *pgs = grad_state.data_ptr<float>();
    float *pgb = grad_b.data_ptr<float>(), *pgc = grad_c.data_ptr<float>();

    auto work = [&](int64_t row, int64_t group, int64_t block, std::vector<Block>& memory) {
        Block *rate = memory.data(), *A = rate + s.N, *g = A + s.N, *gA = g + s.N, *h = gA + s.N;
        Block* decay = h + (L + 1) * s.N;  // h holds one more: that before the chunk
        const int64_t width = s.width(block), states = s.N * s.C;
        load_states(rate, pr, s, block);
        load_states(A, pA, s, block);
        load_states(g, pgh + row * states, s, block);
        std::fill(gA, gA + s.N, Block{});
        for (int64_t k = s.K - 1; k >= 0; k--) {
            const int64_t start = k * L, end = std::min(s.T, start + L);
            load_states(h, pk + (row * s.K + k) * states, s, block);
            for (int64_t t = start; t < end; t++) {
                const int64_t token = row * s.T + t, at = token * s.C + block * WIDTH;
                const float *b = pb + token * s.N, *c = pc + token * s.N, alive = ps && ps[token] ? 0.f : 1.f;
                const Block x = load(px + at, width), delta = load(pd + at, width);
                Block *before = h + (t - start) * s.N, *after = before + s.N, *a = decay + (t - start) * s.N, sum{};
                for (int64_t n = 0; n < s.N; n++)
                    for (int64_t i = 0; i < PARTS; i++) {
                        a[n].part[i] = exp2_of(delta.part[i] * rate[n].part[i]) * alive;
                        after[n].part[i] = a[n].part[i] * before[n].part[i] + x.part[i] * b[n];
                        sum.part[i] += after[n].part[i] * c[n];
                    }
                if (with_y) store(py + at, sum, width);
            }
            for (int64_t t = end - 1; t >= start; t--) {
                const int64_t token = row * s.T + t, at = token * s.C + block * WIDTH;
                const float *b = pb + token * s.N, *c = pc + token * s.N;
                float *gb = pgb + (group * s.B * s.T + token) * s.N, *gc = pgc + (group * s.B * s.T + token) * s.N;
                const Block x = load(px + at, width), delta = load(pd + at, width), gy = load(pgy + at, width);
                const Block *before = h + (t - start) * s.N, *after = before + s.N, *a = decay + (t - start) * s.N;
                Block gx{}, gd{};
                for (int64_t n = 0; n < s.N; n++) {
                    Lanes for_b{}, for_c{};
                    for (int64_t i = 0; i < PARTS; i++) {
                        const Lanes now = g[n].part[i] + gy.part[i] * c[n];
                        for_c += gy.part[i] * after[n].part[i];
                        for_b += now * x.part[i];
                        gx.part[i] += now * b[n];
                        g[n].part[i] = now * a[n].part[i];
                        const Lanes log_decay = g[n].part[i] * before[n].part[i];  // the gradient of delta A
                        gd.part[i] += log_decay * A[n].part[i];
                        gA[n].part[i] += log_decay * delta.part[i];
                    }
                    gb[n] += sum_of(for_b);
                    gc[n] += sum_of(for_c);
                }
                store(pgx + at, gx, width);
                store(pgd + at, gd, width);
            }
        }
        store_states(pgs + row * states, g, s, block);
        store_states(pgA + row * states, gA, s, block);
    };
    at::parallel_for(0, s.B * groups, 1, [&](int64_t first, int64_t last) {
        std::vector<Block> memory((4 + 2 * L + 1) * s.N);
        for (int64_t task = first; task < last; task++)
            for (int64_t block = task % groups; block < s.blocks; block += groups)
                work(task / groups, task % groups, block, memory);
    });
    return {grad_x, grad_delta, grad_A.sum(0), grad_b.sum(0), grad_c.sum(0), grad_state, y};
}

}  // namespace

TORCH_LIBRARY(lightning_slm_cpp, library) {
    library.def(
        "selective_scan(Tensor x, Tensor delta, Tensor rate, Tensor b, Tensor c, Tensor? state, Tensor? starts, int L, "
        "bool keep) -> (Tensor, Tensor, Tensor)");
    library.def(
        "selective_scan_backward(Tensor grad_y, Tensor grad_h, Tensor x, Tensor delta, Tensor A, Tensor rate, Tensor b, "
        "Tensor c, Tensor? starts, Tensor kept, int L, bool with_y) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
        "Tensor)");
    library.impl("selective_scan", c10::DispatchKey::CPU, forward);
    library.impl("selective_scan_backward", c10::DispatchKey::CPU, backward);
}
