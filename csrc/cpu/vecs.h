// Several vectors that take every step of a computation together. A core looks for work among a hundred waiting
// instructions or so: long chains one behind the other, each of which waits for itself, fill that up.
#pragma once

namespace {

template <int N>
struct Vecs {
  Vec v[N];

  Vecs() = default;
  Vecs(Vec same) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) v[i] = same;
  }
};

template <int N>
inline Vec vector_of(const Vecs<N>& a, int i) {
  return a.v[i];
}
inline Vec vector_of(Vec a, int) { return a; }

// f of each vector; what is a Vec is the same for all.
template <int N, class F, class... Args>
inline __attribute__((always_inline)) Vecs<N> in_step(F f, const Args&... args) {
  Vecs<N> out;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) out.v[i] = f(vector_of(args, i)...);
  return out;
}

template <int N>
inline Vecs<N> vabs(const Vecs<N>& a) {
  return in_step<N>([](Vec x) { return vabs(x); }, a);
}
template <int N>
inline Vecs<N> vneg(const Vecs<N>& a) {
  return in_step<N>([](Vec x) { return vneg(x); }, a);
}
template <int N>
inline Vecs<N> vround(const Vecs<N>& a) {
  return in_step<N>([](Vec x) { return vround(x); }, a);
}

// How many vectors a step of these takes: those of the first argument that are several.
template <class... Args>
struct Several {};
template <int N, class... Rest>
struct Several<Vecs<N>, Rest...> {
  static constexpr int count = N;
};
template <class... Rest>
struct Several<Vec, Rest...> : Several<Rest...> {};

template <class A, class B, int N = Several<A, B>::count>
inline Vecs<N> vadd(const A& a, const B& b) {
  return in_step<N>([](Vec x, Vec y) { return vadd(x, y); }, a, b);
}
template <class A, class B, int N = Several<A, B>::count>
inline Vecs<N> vsub(const A& a, const B& b) {
  return in_step<N>([](Vec x, Vec y) { return vsub(x, y); }, a, b);
}
template <class A, class B, int N = Several<A, B>::count>
inline Vecs<N> vmul(const A& a, const B& b) {
  return in_step<N>([](Vec x, Vec y) { return vmul(x, y); }, a, b);
}
template <class A, class B, int N = Several<A, B>::count>
inline Vecs<N> vdiv(const A& a, const B& b) {
  return in_step<N>([](Vec x, Vec y) { return vdiv(x, y); }, a, b);
}
template <class A, class B, int N = Several<A, B>::count>
inline Vecs<N> vmin(const A& a, const B& b) {
  return in_step<N>([](Vec x, Vec y) { return vmin(x, y); }, a, b);
}
template <class A, class B, class C, int N = Several<A, B, C>::count>
inline Vecs<N> vfma(const A& a, const B& b, const C& c) {
  return in_step<N>([](Vec x, Vec y, Vec z) { return vfma(x, y, z); }, a, b, c);
}
template <class A, class B, class C, int N = Several<A, B, C>::count>
inline Vecs<N> vscale2_from(const A& a, const B& b, const C& c) {
  return in_step<N>([](Vec x, Vec y, Vec z) { return vscale2_from(x, y, z); }, a, b, c);
}

}  // namespace
